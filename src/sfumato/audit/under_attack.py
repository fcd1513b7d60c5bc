"""An attack in an audit: on the edited model, on the edited model without knowledge, and on the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from jaxtyping import Bool, UInt8
from torch import Tensor

from sfumato import catalog
from sfumato.attack.base import Attack, say
from sfumato.data.cases import Case
from sfumato.metrics.detectors import Detector
from sfumato.metrics.resize import to_bytes
from sfumato.pipeline import Text2Image

Pictures = UInt8[Tensor, "n 3 height width"]

LEARNING = 90_000
"""Offset of the seeds of the pictures that attacks learn from, so that none is a picture of the audit."""


@dataclass(frozen=True)
class Outcome:
    """For each picture of the audit's own prompts and seeds: does the detector find the erased concept?"""

    recovered: Bool[Tensor, "n"]
    control: Bool[Tensor, "n"] | None
    original: Bool[Tensor, "n"]
    attacked_pictures: Pictures
    control_pictures: Pictures | None


def make_attack(attack: str | Attack, model: Text2Image) -> Attack:
    """The attack of that name with the settings that suit the model."""
    if isinstance(attack, Attack):
        return attack
    cls = catalog.get(attack, "attack").load()
    return cls(**cls.settings_for(model))


def attack_names(attacks: Sequence[Attack]) -> list[str]:
    """The catalogue's name of each; the second of a name is "NAME (2)", and so on."""
    known = {m.class_name: m.name for m in catalog.methods("attack")}
    plain = [known.get(type(a).__name__, type(a).__name__) for a in attacks]
    counts = [plain[: i + 1].count(name) for i, name in enumerate(plain)]
    return [name if k == 1 else f"{name} ({k})" for name, k in zip(plain, counts, strict=True)]


def assail(
    attack: Attack,
    before: Text2Image,
    after: Text2Image,
    concept: str,
    control: str | None,
    cases: Sequence[Case],
    detector: Detector,
    draw: Callable[[Text2Image, Sequence[str], Sequence[int]], Pictures],
    sampling: Mapping[str, object],
    progress: bool,
) -> Outcome:
    """Run the attack three times with one budget, and draw ``cases`` under each.

    - on ``after`` with pictures of ``concept`` drawn by ``before``: what an attacker gets back;
    - on ``after`` with pictures of ``control`` (the same prompts but for the concept's name): what the attack
      yields without any knowledge of the concept;
    - on ``before`` with pictures of ``concept``: it must succeed here, or it proves nothing.
    """
    count = getattr(attack, "n_images", 0)
    sources = [cases[i % len(cases)] for i in range(count)]
    seeds = [LEARNING + cases[0].seed + i for i in range(count)]
    prompts, seeds_of_cases = [c.prompt for c in cases], [c.seed for c in cases]

    @cache
    def shown(word: str) -> dict[str, object]:
        if not count:
            return {}
        texts = [say(c.prompt, concept, word) for c in sources]
        return {"images": to_float(draw(before, texts, seeds)), "prompts": texts}

    def found(on: Text2Image, word: str) -> Pictures:
        result = attack.run(on, word, **shown(word), original=before, progress=progress)
        # The audit's prompts name the erased concept; a control asks in the same words for what it learned.
        result = replace(result, concept=concept)
        return to_bytes(result.draw(on, prompts, seeds_of_cases, progress=progress, **sampling))

    present = lambda pictures: detector(to_float(pictures), concept).present
    attacked = found(after, concept)
    ignorant = found(after, control) if control is not None else None
    return Outcome(
        present(attacked), None if ignorant is None else present(ignorant), present(found(before, concept)),
        attacked, ignorant,
    )  # fmt: skip


def to_float(pictures: Pictures) -> Tensor:
    """8-bit pictures as float32 in [0, 1]."""
    return pictures.float() / 255
