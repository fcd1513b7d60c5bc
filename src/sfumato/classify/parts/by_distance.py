"""What classifiers share that compare pictures by distances to prototypes: plain Adam, and full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sfumato.classify.base import Classifier
from sfumato.fields import Decay, Natural, NotNegative, Share


@dataclass(frozen=True, kw_only=True)
class ByDistance(Classifier):
    """Fields of such a classifier; not a method itself."""

    shift: Share = 0.0
    label_smoothing: Decay = 0.0
    warmup: Natural = 0
    decay: Literal["cosine", "linear", "constant"] = "constant"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decays of the averaged gradient and of its square."""
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 0.0
    precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    """Mixed precision: "no", "bf16" or "fp16", in which distances are differences of large numbers; "auto" is bf16 on a
    GPU that has it."""
