"""Inception-v4: Inceptions with and without residual connections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive
from sfumato.foreign import read_tensors
from sfumato.nets.inception import SMALLEST, Inception, load_published

from .base import Classifier
from .parts.rules import Rule


@dataclass(frozen=True, kw_only=True)
class InceptionV4(Classifier):
    """Inception-v4, Inception-ResNet-v1 and -v2 in its two variants, trained by the paper's recipe.

    arXiv:1602.07261. A residual block is y = ReLU(x + s lin(inception(x))) (section 3.3), where lin is a convolution of
    1x1 with bias and nothing is normalised after the sum. "inception-resnet-v2" is the net of all released weights;
    "inception-resnet-v2-paper" the one that the paper draws, where its printed widths 1154 and 2048 are the 1152 and
    2144 that the shapes force. RMSProp as TensorFlow has it, the rate falling by steps, an average of the weights.
    Cost: a forward and a backward pass; about 12 and 13 GMACs a picture of 299 pixels for v4 and v2.

    Differs from the paper: the branches of a block are joined in the order of the released weights; 20 replicas are one
    batch. Reconstructed: the residuals' scales, the constant of batch normalisation and the decay of the average are
    the released code's; the threshold of clipping is Inception-v3's. There is no auxiliary head, of which the paper
    says nothing. The average's batch statistics are measured anew, where TensorFlow averages them along with it.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **Classifier.EXAMPLE, "size": 32, "net": "inception-resnet-v2", "width": 1 / 16, "blocks": (1, 1, 2),
        "small": True, "lr": 0.01,
    }  # fmt: skip
    STARTS: ClassVar[frozenset[str]] = frozenset({"weights"})
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small-pictures": {
            "size": 32, "small": True, "width": 0.125, "blocks": (2, 2, 1), "net": "inception-resnet-v2",
            "update_rule": "adamw", "lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05,
            "updates": 2000, "batch": 64, "rate_every": 0, "ema": 0.99, "warmup": 100, "clip_norm": 1.0,
        },
    }  # fmt: skip
    """``small-pictures``: for a CPU, untuned."""

    net: Literal["inception-v4", "inception-resnet-v1", "inception-resnet-v2", "inception-resnet-v2-paper"] = (
        "inception-v4"
    )
    """Which of the nets."""
    join: Literal["residual", "control", "concat"] | None = None
    """How a block ends: with the residual sum; the same parameters without the sum; or its branches side by side. By
    default as published."""
    residual_scale: NotNegative | None = None
    """s of all residuals but the slim net's last, which is 1; 0.1 to 0.3 in the paper, by default 0.17, 0.10 and 0.20
    for A, B and C."""
    width: Positive = 1.0
    """Factor of all channels."""
    blocks: tuple[Count, Count, Count] | None = None
    """How many blocks A, B and C; by default as published."""
    dropout: Decay = 0.2
    """Share of the pooled features that is dropped."""
    small: bool = False
    """Leave out the first two strides, for pictures of 27 pixels and more."""
    weights: Path | None = None
    """Released weights to start from, a safetensors file with timm's keys; the last layer is fresh where it has other
    classes."""
    rate_every: Natural = 40_036
    """Updates between falls of the learning rate: the paper's 2 epochs of ImageNet, in batches of 64; 0: the rate is as
    ``decay`` says."""
    rate_factor: Positive = 0.94
    """What the learning rate is then multiplied by."""
    size: Count = 299
    flip: bool = True
    update_rule: Rule = "rmsprop"
    momentum: Decay = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.9)
    """The optimiser's decays: of the averaged gradient (AdamW) and of its square."""
    eps: NotNegative = 1.0
    """The optimiser's constant; RMSProp's is inside the root."""
    lr: Positive = 0.045
    warmup: Natural = 0
    weight_decay: NotNegative = 4e-5
    clip_norm: NotNegative = 2.0
    ema: Decay = 0.9997
    updates: Natural = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < SMALLEST[self.small]:
            smaller = "" if self.small else ", or 27 and more with small on"
            raise BadInput(f"size must be at least {SMALLEST[self.small]} for this net, got {self.size}{smaller}")

    def network(self, labels: tuple[str, ...]) -> nn.Module:
        net = Inception(
            self.net, len(labels), self.join, self.residual_scale, self.width, self.blocks, self.dropout, self.small
        )
        if self.weights is not None:
            state, _ = read_tensors(self.weights, "released weights")
            last = "last_linear" if self.net == "inception-v4" else "classif"
            own = {f"{last}.{part}": x for part, x in net.head.state_dict().items()}
            other = any(key in state and state[key].shape != x.shape for key, x in own.items())
            load_published(net, self.net, {**state, **own} if other else state)
        return net

    def rate(self) -> Callable[[int], float] | None:
        if not self.rate_every:
            return None
        return lambda step: self.lr * self.rate_factor ** (step // self.rate_every)
