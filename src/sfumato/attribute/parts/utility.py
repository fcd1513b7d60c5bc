"""The worth of an alliance: how much nearer its pictures are to the original than those of the bare base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sfumato.errors import BadInput, unknown
from sfumato.metrics.extractors import Extractor
from sfumato.metrics.features import Features
from sfumato.metrics.frechet import frechet_influence
from sfumato.metrics.resize import to_bytes
from sfumato.metrics.sets import SETS

from .similarity import SIMILARITIES

ALONE = ("is",)
"""Distances that look at no original."""
DISTANCES = (*(name for name in SETS if name not in ALONE), *SIMILARITIES)
VIEWS = 16
"""How many views stand for an original that there is one picture of."""


@dataclass(frozen=True)
class Measured:
    """How near an alliance's pictures are to the original; more is nearer.

    Attributes:
        value: minus a distance, or a similarity.
        influence: of each seed's picture on it, of mean 0: to first order the value moves by the mean of the
            influences of the pictures drawn.
        noise: standard error of the value for these very pictures.
    """

    value: float
    influence: Float[Tensor, "seeds"]
    noise: float = 0.0


@dataclass
class Utility:
    """A distance by name, held against originals.

    Attributes:
        distance: one of `DISTANCES`.
        originals: in [0, 1]; pairs are compared with each and the best counts.
        extractor: of the distances of sets.
        seed: of subsets.
    """

    distance: str
    originals: Float[Tensor, "m 3 height width"]
    extractor: Extractor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_distance(self.distance)
        if self.paired:
            return
        if self.extractor is None:
            raise BadInput(f"{self.distance} compares features: say with extractor which")
        self.real = self.features(self.originals)

    @property
    def paired(self) -> bool:
        """Whether it compares picture with picture, and not set with set."""
        return self.distance in SIMILARITIES

    def features(self, pictures: Float[Tensor, "n 3 height width"]) -> Features:
        if self.extractor is None:
            raise BadInput(f"{self.distance} compares features: say with extractor which")
        levels: UInt8[Tensor, "n 3 height width"] = to_bytes(pictures)
        values = torch.cat([self.extractor(some).float().cpu() for some in levels.split(64)])
        return Features(values, self.extractor.name, self.extractor.hash, self.extractor.resize)

    def __call__(self, pictures: Float[Tensor, "n 3 height width"]) -> Measured:
        """How near these pictures, one a seed, are to the originals."""
        if self.paired:
            like = self.pairs(pictures)
            return Measured(float(like.mean()), like - like.mean())
        return self.sets(self.features(pictures))

    def pairs(self, pictures: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n"]:
        """Each picture's likeness to the original that it is most like."""
        measure, n = SIMILARITIES[self.distance], len(pictures)
        x = pictures.double()
        if self.originals.shape[1:] != pictures.shape[1:]:
            raise BadInput("pictures and originals are compared at one size: give originals of the size that is drawn")
        found = [measure(x, original.double().expand(n, -1, -1, -1)) for original in self.originals]
        return torch.stack(found).amax(0)

    def sets(self, generated: Features) -> Measured:
        if self.distance == "fid":
            value, influence = frechet_influence(self.real.gaussian, generated.gaussian)
            return Measured(-value, -influence.cpu())
        value = self._score(generated)
        n = len(generated)
        if n < 3:
            return Measured(value, torch.zeros(n, dtype=torch.float64))
        # the jackknife: what each picture's absence does, for distances whose influences are not at hand
        without = [self._score(replace(generated, values=_but(generated.values, i), known=None)) for i in range(n)]
        own = torch.tensor([(n - 1) * (value - x) for x in without], dtype=torch.float64)
        return Measured(value, own - own.mean())

    def _score(self, generated: Features) -> float:
        metric = SETS[self.distance](self.extractor, seed=self.seed)
        metric.check(len(self.real), len(generated))
        measured = metric.measure(self.real, generated)
        score = measured[self.distance] if isinstance(measured, Mapping) else measured
        return -score.value if score.better == "lower" else score.value

    def about(self) -> dict[str, Any]:
        """What it is, for records."""
        told: dict[str, Any] = {"distance": self.distance, "originals": len(self.originals)}
        if self.extractor is not None and not self.paired:
            told |= {"extractor": self.extractor.name, "weights": self.extractor.hash, "resize": self.extractor.resize}
        return told


def check_distance(name: str) -> None:
    """Raise `BadInput` for a distance that there is not, or that looks at no original."""
    if name not in DISTANCES:
        raise unknown("distance", name, DISTANCES)


def views(
    original: Float[Tensor, "m 3 height width"], n: int = VIEWS, seed: int = 0
) -> Float[Tensor, "k 3 height width"]:
    """``n`` views of too few originals for a distance of sets: mirrored or not, cut to 80 to 100 % of their sides."""
    rng = torch.Generator().manual_seed(seed)
    size, made = original.shape[-2:], []
    for i in range(n):
        x = original[i % len(original)][None]
        share = 0.8 + 0.2 * float(torch.rand((), generator=rng))
        h, w = (max(1, round(side * share)) for side in size)
        top, left = (int(torch.randint(s - cut + 1, (), generator=rng)) for s, cut in zip(size, (h, w), strict=True))
        x = x[..., top : top + h, left : left + w]
        x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        made.append(x.flip(-1) if torch.rand((), generator=rng) < 0.5 else x)
    return torch.cat(made).clamp(0, 1)


def _but(x: Tensor, i: int) -> Tensor:
    return torch.cat([x[:i], x[i + 1 :]])
