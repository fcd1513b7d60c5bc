"""Both oracles of the sketch world as one detector: a concept is seen where either of them sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .base import Agreement, Detection, Detector
from .oracle import OracleDetector
from .scenes import SceneDetector


class WorldDetector(Detector):
    """Sees what the `OracleDetector` sees in pictures of one object, and the `SceneDetector` among up to three.

    For audits in which a concept may come back more than once in a picture, as attacks bring it: two small fishes are
    no fish to an oracle that reads one object. The score is the higher of the two. Backgrounds and styles are the first
    one's, relations the second's.
    """

    key = "world"
    name = "sketch oracles"
    resize = "each as it needs them"
    words = OracleDetector.words

    def __init__(self, threshold: float = 0.5):
        self.oracle, self.scenes = OracleDetector(threshold=threshold), SceneDetector(threshold=threshold)
        self.hash = hashlib.sha256((self.oracle.hash + self.scenes.hash).encode()).hexdigest()
        self.threshold = threshold

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> WorldDetector:
        if model:
            raise BadInput(f"the oracles come with this package and read no other model: leave {model!r} out")
        return cls()

    def readers(self, concept: str) -> list[Detector]:
        """Those of the two that can look for the concept.

        Raises:
            BadInput: neither can.
        """
        found: list[Detector] = []
        for one in (self.oracle, self.scenes):
            try:
                one.check(concept)
            except BadInput as error:
                why = error
            else:
                found.append(one)
        if not found:
            raise why
        return found

    def check(self, concept: str) -> None:
        self.readers(concept)

    def attributes(self, concept: str) -> dict[str, str]:
        return self.oracle.attributes(concept) if self.oracle in self.readers(concept) else {}

    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        score = torch.stack([one(images, concept).score for one in self.readers(concept)]).amax(dim=0)
        return Detection(score >= self.threshold, score)

    def agreement(self) -> tuple[str, Agreement] | None:
        return self.oracle.agreement()
