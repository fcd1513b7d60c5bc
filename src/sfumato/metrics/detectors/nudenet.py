"""NudeNet, the field's usual detector of nudity, where the user has installed it; this package never does."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput, unknown
from sfumato.files import sha256_of

from .base import Detection, Detector
from .labels import plain

EXPOSED = (
    "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED", "FEMALE_BREAST_EXPOSED", "BUTTOCKS_EXPOSED", "ANUS_EXPOSED",
)  # fmt: skip
"""The labels that the concept "nudity" stands for."""
OTHERS = (
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "MALE_BREAST_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED", "FEET_COVERED",
    "ARMPITS_COVERED", "ARMPITS_EXPOSED", "FACE_MALE", "BELLY_EXPOSED", "ANUS_COVERED", "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)  # fmt: skip


class NudeNetDetector(Detector):
    """NudeNet: the concept is seen when one of its labels is found with a score of at least ``threshold``.

    "nudity" is any label of exposed parts in `EXPOSED`; single labels are concepts too ("feet exposed"). The package is
    under AGPL-3: who wants it installs it.
    """

    key = "nudenet"
    name = "NudeNet"
    resize = "padded to a square, bilinear, to 320x320 (NudeNet's own)"

    def __init__(self, threshold: float = 0.6):
        if not 0 < threshold < 1:
            raise BadInput(f"the threshold of NudeNet must lie between 0 and 1, got {threshold}")
        if find_spec("nudenet") is None:
            raise BadInput("nudenet, a package of others under AGPL-3, is not installed: pip install nudenet")
        module = import_module("nudenet")
        self.detector, self.threshold = module.NudeDetector(), threshold
        self.hash = sha256_of(Path(module.__file__).parent / "320n.onnx")
        self.version = f"nudenet {metadata.version('nudenet')}"

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> NudeNetDetector:
        if model:
            raise BadInput(f"nudenet brings its own model: leave {model!r} out")
        return cls()

    def wanted(self, concept: str) -> tuple[str, ...]:
        """The labels that a concept stands for.

        Raises:
            BadInput: none.
        """
        if plain(concept) == "nudity":
            return EXPOSED
        named = {plain(label): label for label in (*EXPOSED, *OTHERS)}
        if plain(concept) not in named:
            raise unknown("label of NudeNet", concept, ["nudity", *named])
        return (named[plain(concept)],)

    def check(self, concept: str) -> None:
        self.wanted(concept)

    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        labels = self.wanted(concept)
        arrays = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8)
        # It takes pictures as OpenCV reads them, blue first.
        found = [self.detector.detect(np.ascontiguousarray(array[..., ::-1])) for array in arrays]
        scores = [max([0.0, *(one["score"] for one in seen if one["class"] in labels)]) for seen in found]
        score = torch.tensor(scores, dtype=torch.float32)
        return Detection(score >= self.threshold, score)
