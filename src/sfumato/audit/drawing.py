"""All pictures of an audit: who draws, what, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load, save
from torch import Tensor

from sfumato.attack.base import Attack
from sfumato.data.cases import Case, Cases
from sfumato.errors import BadInput
from sfumato.finite import NotFinite
from sfumato.metrics.detectors import Detector
from sfumato.metrics.detectors.base import Agreement
from sfumato.metrics.perceptual import Distance
from sfumato.metrics.resize import to_bytes
from sfumato.pipeline import Text2Image
from sfumato.pipeline.distilled import own_way
from sfumato.progress import track

Pictures = UInt8[Tensor, "n 3 height width"]

FLOOR = 8
"""Pictures that the original draws twice, to see that nothing but the edit tells the two models apart."""
CEILING = 16
"""Pictures that the original draws again with other seeds."""
OTHER_SEEDS = 50_000


@dataclass(frozen=True)
class Setup:
    """What an audit works with: both models, what they are asked, and who looks at the pictures.

    Attributes:
        alignment: (name, measure) of how well pictures match their prompts, or None.
        attacks: by the name that they have in the report.
        n_attack: pictures drawn under attack for each erased concept.
        sampling: settings of `Text2Image.draw`.
    """

    old: Text2Image
    new: Text2Image
    cases: Cases
    detector: Detector
    distance: Distance
    alignment: tuple[str, Agreement] | None
    attacks: Mapping[str, Attack]
    n_attack: int
    sampling: Mapping[str, Any]
    progress: bool

    def control(self, concept: str) -> str | None:
        """The concept that a control attack learns: the first retained one of the nearest group."""
        return next((c for c in self.cases.concepts if c != concept), None)

    @property
    def targets(self) -> list[Case]:
        """The cases of all erased concepts, one concept after the other."""
        return [case for rows in self.cases.targets.values() for case in rows]


@dataclass(frozen=True)
class Pair:
    """Pictures of the original and of the edited model, of the same prompts and seeds."""

    before: Pictures
    after: Pictures

    def __getitem__(self, rows: slice | list[int]) -> Pair:
        return Pair(self.before[rows], self.after[rows])


@dataclass(frozen=True)
class Original:
    """What the original model draws: the same whatever it is compared with, so that several audits can share it.

    Attributes:
        pictures: of the retained prompts, and then of those that name an erased concept.
        again: the first `FLOOR` of them, drawn once more.
        reseeded: the first `CEILING` of them, with other seeds.
        attacked: under each attack, by the name that it has in the report, of each concept's cases; empty where attacks
            on it have not been run.
    """

    pictures: Pictures
    again: Pictures
    reseeded: Pictures
    attacked: Mapping[str, Mapping[str, Pictures]] = field(default_factory=dict)

    @classmethod
    def by(cls, setup: Setup) -> Original:
        """Draw them, without attacks."""
        kept, who = setup.cases.retained, "the original model"
        return cls(
            whole(setup, setup.old, who),
            draw(setup, setup.old, *_asked(kept[:FLOOR]), who, "floor"),
            draw(setup, setup.old, *_asked(kept[:CEILING], OTHER_SEEDS), who, "ceiling"),
        )

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        under = {f"{name}/{concept}": x for name, of in self.attacked.items() for concept, x in of.items()}
        parts = {"pictures": self.pictures, "again": self.again, "reseeded": self.reseeded}
        return save({name: x.contiguous() for name, x in {**parts, **under}.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Original:
        """What `to_bytes` wrote."""
        parts = load(data)
        attacked: dict[str, dict[str, Pictures]] = {}
        for key in [key for key in parts if "/" in key]:
            name, concept = key.split("/", 1)
            attacked.setdefault(name, {})[concept] = parts[key]
        return cls(parts["pictures"], parts["again"], parts["reseeded"], attacked)


@dataclass(frozen=True)
class Drawn:
    """The pictures that both models draw.

    Attributes:
        kept, asked: of the retained prompts, and of those that name an erased concept.
        again, reseeded: by the original; see `Original`.
    """

    kept: Pair
    asked: Pair
    again: Pictures
    reseeded: Pictures

    @classmethod
    def by(cls, setup: Setup, original: Original | None = None) -> Drawn:
        """Draw them all; those of the original model need not be drawn again where they are given."""
        original = original or Original.by(setup)
        both = Pair(original.pictures, whole(setup, setup.new, "the edited model"))
        kept = len(setup.cases.retained)
        return cls(both[:kept], both[kept:], original.again, original.reseeded)


def whole(setup: Setup, pipe: Text2Image, who: str) -> Pictures:
    """All that is asked: the retained prompts, and then those that name an erased concept."""
    kept = setup.cases.retained
    # The first few by themselves: the floor draws them again, and a batch of another size rounds differently.
    parts = [part for part in (kept[:FLOOR], kept[FLOOR:], setup.targets) if part]
    return torch.cat([draw(setup, pipe, *_asked(part), who, who.removeprefix("the ")) for part in parts])


def way(setup: Setup, pipe: Text2Image) -> dict[str, Any]:
    """How ``pipe`` draws: with the audit's settings; one that was distilled to few steps in these, in its own way."""
    return own_way(pipe, setup.sampling)


def draw(
    setup: Setup,
    pipe: Text2Image,
    prompts: Sequence[str],
    seeds: Sequence[int],
    who: str,
    label: str = "pictures",
) -> Pictures:
    """8-bit pictures, batch by batch, with a bar if wanted; ``who`` says in a refusal whose they are.

    Raises:
        BadInput: a picture is not finite.
    """
    size = setup.sampling["batch"]
    if not prompts:
        return torch.empty(0, 3, pipe.size, pipe.size, dtype=torch.uint8)
    parts = []
    for i in track(range(0, len(prompts), size), label, setup.progress):
        try:
            pictures = pipe.draw(list(prompts[i : i + size]), list(seeds[i : i + size]), **way(setup, pipe))
        except NotFinite as error:
            raise BadInput(f"{who} is broken: {error}") from error
        parts.append(sound_bytes(pictures, who))
    return torch.cat(parts)


def sound_bytes(pictures: Float[Tensor, "n 3 height width"], who: str) -> Pictures:
    """8-bit pictures of those in [0, 1]; `BadInput` where some are not finite."""
    broken = ~pictures.isfinite().flatten(1).all(1)
    if broken.any():
        raise BadInput(
            f"{who} drew pictures that are not finite (NaN or infinity), {int(broken.sum())} of {len(broken)}: nothing "
            "can be seen in them; load it in float32, or train or erase with a smaller learning rate"
        )
    return to_bytes(pictures)


def _asked(cases: Sequence[Case], offset: int = 0) -> tuple[list[str], list[int]]:
    return [c.prompt for c in cases], [c.seed + offset for c in cases]
