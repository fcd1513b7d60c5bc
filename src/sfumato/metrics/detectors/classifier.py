"""Any image classifier of `transformers` as a detector."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.foreign import reading

from ..trained import is_trained
from ..vision import load_vision, module_sha256, reads_text
from .base import Detection, needed
from .labels import LabelDetector, joined
from .onnx import OnnxDetector


class ClassifierDetector(LabelDetector):
    """Any `transformers` image classifier: the concept is seen when its label is among the ``top`` most likely."""

    key = "classifier"

    def __init__(self, model: str | os.PathLike, top: int = 1, batch: int = 64):
        """``model``: a folder written by ``save_pretrained``, or a hub id."""
        from transformers import AutoModelForImageClassification

        self.model = load_vision(model, AutoModelForImageClassification)
        self.name = f"classifier {self.model.name}"
        self.hash = module_sha256(self.model.network)
        self.threshold = f"top-{top}"
        self.top, self.batch = top, batch
        self.resize = self.model.prepare.rule
        config = self.model.network.config
        with reading(model, "an image classifier"):
            self.labels = [config.id2label[i] for i in range(config.num_labels)]
        if not all(isinstance(label, str) for label in self.labels):
            raise BadInput(f"{self.model.name} has labels (id2label) that are no text: write its config.json again")

    @classmethod
    def reads(cls, model: str) -> bool:
        if os.path.isfile(model) or OnnxDetector.reads(model) or is_trained(model):
            return False
        return not reads_text(model)

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> ClassifierDetector:
        return cls(needed(model, cls.key))

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        parts = []
        for x in images.split(self.batch) if len(images) else ():  # some networks refuse an empty batch
            pixels = self.model.prepare(x.to(self.model.device, torch.float32))
            parts.append(self.model.network(pixel_values=pixels).logits.float().cpu().softmax(dim=1))
        return self.judged(joined(parts, self.labels), concept)
