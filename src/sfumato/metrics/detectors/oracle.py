"""The sketch world's oracle as a detector."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data import oracle as oracles
from sfumato.errors import BadInput, unknown

from ..alignment import named, oracle_alignment
from ..vision import module_sha256
from .base import Agreement, Detection, Detector

_FILLERS = {"a", "an", "the", "in", "on", "of", "style", "background", "picture", "shape"}


class OracleDetector(Detector):
    """The sketch world's oracle. A concept of several words ("red star") is seen when each of them is."""

    key = "oracle"
    name = "sketch oracle"
    words: ClassVar[Mapping[str, Sequence[str]]] = {
        a: tuple(w for w in known if w != oracles.NOTHING) for a, known in oracles.WORDS.items()
    }

    def __init__(self, oracle: oracles.Oracle | None = None, threshold: float = 0.5):
        self.oracle = oracle or oracles.load()
        self.hash = module_sha256(self.oracle)
        self.threshold = threshold
        self.resize = f"bilinear, antialiased, to {oracles.SIDE}x{oracles.SIDE}"

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> OracleDetector:
        if model:
            raise BadInput(f"the oracle comes with this package and reads no other model: leave {model!r} out")
        return cls()

    def attributes(self, concept: str) -> dict[str, str]:
        """Attribute -> word, e.g. "red star" -> {"colour": "red", "object": "star"}.

        Raises:
            BadInput: a word that the sketch world does not have.
        """
        found = named(concept, self.words)
        for word in re.findall(r"[\w-]+", concept.lower()):
            if word not in found.values() and word not in _FILLERS:
                raise unknown("concept of the sketch world", word, [w for known in self.words.values() for w in known])
        if not found:
            raise BadInput(f"{concept!r} names nothing of the sketch world: name an object, colour, ground or style")
        return found

    def check(self, concept: str) -> None:
        self.attributes(concept)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        logits = self.oracle(images)
        share = [
            logits[a].softmax(dim=1)[:, self.oracle.words(a).index(w)] for a, w in self.attributes(concept).items()
        ]
        score = torch.stack(share).amin(dim=0).cpu()
        return Detection(score >= self.threshold, score)

    def agreement(self) -> tuple[str, Agreement]:
        def measure(pictures: Tensor, prompts: Sequence[str]) -> Float[Tensor, "n"]:
            with torch.no_grad():
                return oracle_alignment(self.oracle(pictures), oracles.WORDS, prompts)

        return "share of the attributes named that the oracle reads off the picture", measure
