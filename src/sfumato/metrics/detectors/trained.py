"""A classifier that ``sfumato classify`` trained, of a network that `transformers` does not know, as a detector."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..trained import is_trained, load_trained
from ..vision import module_sha256
from .base import Detection, needed
from .labels import LabelDetector, joined


class TrainedDetector(LabelDetector):
    """The concept is seen when its label is among the ``top`` most likely."""

    key = "trained"

    def __init__(self, model: str | os.PathLike, top: int = 1, batch: int = 64):
        """``model``: a folder that ``sfumato classify`` wrote."""
        self.model = load_trained(model)
        self.name = f"classifier {self.model.name}"
        self.hash = module_sha256(self.model.network)
        self.threshold = f"top-{top}"
        self.top, self.batch = top, batch
        self.labels = self.model.labels
        self.resize = self.model.prepare.rule

    @classmethod
    def reads(cls, model: str) -> bool:
        return is_trained(model)

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> TrainedDetector:
        return cls(needed(model, cls.key))

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        prepare, device = self.model.prepare, self.model.device
        parts = [self.model.network(prepare(x.to(device, torch.float32))) for x in images.split(self.batch) if len(x)]
        return self.judged(joined([x.float().cpu().softmax(dim=1) for x in parts], self.labels), concept)
