"""CLIP-style models as detectors."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from ..trained import is_trained
from ..vision import ClipModel, module_sha256, reads_text
from .base import Detection, Detector, needed
from .onnx import OnnxDetector


class ZeroShotDetector(Detector):
    """A CLIP-style model: the concept is seen when its text is nearer to the picture than every other one's.

    The score is the softmax over texts of the model's scaled cosines.
    """

    key = "zero-shot"
    threshold = "top-1"

    def __init__(
        self,
        model: str | os.PathLike,
        concepts: Sequence[str],
        template: str = "a photo of {}",
        neutral: str = "a photo",
    ):
        """``concepts``: what pictures may show besides the one looked for; ``neutral``: none of them."""
        self.clip = ClipModel.load(model)
        self.name = f"zero-shot {self.clip.vision.name}, {template!r} among {len(set(concepts))} and {neutral!r}"
        self.hash = module_sha256(self.clip.vision.network)
        self.resize = self.clip.vision.prepare.rule
        self.concepts, self.template, self.neutral = tuple(dict.fromkeys(concepts)), template, neutral
        scale = getattr(self.clip.vision.network, "logit_scale", None)
        self.scale = 100.0 if scale is None else float(scale.detach().exp())

    @classmethod
    def reads(cls, model: str) -> bool:
        if os.path.isfile(model) or OnnxDetector.reads(model) or is_trained(model):
            return False
        return reads_text(model)

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> ZeroShotDetector:
        return cls(needed(model, cls.key), concepts)

    def check(self, concept: str) -> None:
        if not [c for c in self.concepts if c != concept]:
            raise BadInput("zero-shot detection needs other concepts to tell this one from: name some to retain")

    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        others = [c for c in self.concepts if c != concept]
        texts = [self.template.replace("{}", c) for c in (concept, *others)] + [self.neutral]
        embedded = self.clip.texts(texts)
        parts = [self.scale * self.clip.images(x) @ embedded.T for x in (images.split(64) if len(images) else ())]
        logits = torch.cat(parts).float().cpu() if parts else torch.empty(0, len(texts))
        return Detection(logits.argmax(dim=1) == 0, logits.softmax(dim=1)[:, 0])
