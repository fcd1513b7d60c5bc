"""The sketch world's scene oracle as a detector of whole phrases: seen is what shows all of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data import scenes
from sfumato.data.sketch.asked import Asked, asked
from sfumato.errors import BadInput

from ..vision import module_sha256
from .base import Detection, Detector


class SceneDetector(Detector):
    """Objects, their colours, and how they stand to each other: "a red star left of a blue fish", "two red stars".

    The score is that of the least sure object of the best choice of objects that fits the concept, 0 where none does.
    Backgrounds and styles are the `OracleDetector`'s.
    """

    key = "scenes"
    name = "sketch scene oracle"

    def __init__(self, oracle: scenes.SceneOracle | None = None, threshold: float = 0.5):
        self.oracle = oracle or scenes.load()
        self.hash = module_sha256(self.oracle)
        self.threshold = threshold
        self.resize = f"bilinear, antialiased, to {scenes.SIDE}x{scenes.SIDE}"

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> SceneDetector:
        if model:
            raise BadInput(f"the scene oracle comes with this package and reads no other model: leave {model!r} out")
        return cls()

    def check(self, concept: str) -> None:
        asked(concept)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        wanted = asked(concept)
        found = [self.oracle.read(part, threshold=0.05) for part in images.split(64)]
        score = torch.tensor([best(wanted, seen) for part in found for seen in part])
        return Detection(score >= self.threshold, score)


def best(wanted: Asked, seen: Sequence[scenes.Found]) -> float:
    """The highest score with which the objects seen are what was asked for; each answers for one object at most."""
    scores = [0.0]
    for chosen in permutations(seen, len(wanted.items)):
        pairs = zip(wanted.items, chosen, strict=True)
        fits = all(colour in (None, f.colour) and thing in (None, f.object) for (colour, thing), f in pairs)
        if fits and all(scenes.holds(chosen[a], relation, chosen[b]) for a, relation, b in wanted.relations):
            scores.append(min(f.score for f in chosen))
    return max(scores)
