"""Plain: a network by name, trained by the cross-entropy of the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from sfumato.errors import BadInput
from sfumato.fields import Count
from sfumato.metrics.trained import described
from sfumato.metrics.vision import load_vision

from .base import Classifier
from .parts.networks import Wrapped, by_name


@dataclass(frozen=True, kw_only=True)
class Plain(Classifier):
    """Any network by name, by default a small residual one.

    arXiv:1512.03385 for the default: a ResNet of `transformers` with one basic block a level. Cost: a forward and a
    backward pass of the network per update.

    Differs from the paper: everything but the network is a matter of settings; AdamW and a cosine by default.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {**Classifier.EXAMPLE, "widths": (8, 16)}

    backbone: str = "resnet"
    """"resnet": a small one of ``widths``; "resnet20", "resnet32", ...: the paper's for pictures of 32 pixels;
    "timm:NAME": any of timm's, where it is installed; "transformers:TYPE": a fresh image classifier of that model type,
    at its default size; "transformers:FOLDER": trained on from one that save_pretrained wrote, with a last layer of its
    own where the classes are others."""
    widths: tuple[Count, ...] = (48, 96, 160, 256)
    """Channels of the levels of "resnet"."""

    def network(self, labels: tuple[str, ...]) -> nn.Module:
        return by_name(self.backbone, labels, self.size, self.widths)

    @classmethod
    def read(cls, folder: str | Path) -> nn.Module:
        if not (Path(folder) / "config.json").is_file():
            return super().read(folder)
        from transformers import AutoModelForImageClassification

        about, _ = described(folder)
        if about["classifier"] != cls.name():
            raise BadInput(f"{folder} was made by classify {about['classifier']}, not by {cls.name()}")
        return Wrapped(load_vision(folder, AutoModelForImageClassification).network).eval().requires_grad_(False)
