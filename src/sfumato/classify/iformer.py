"""iFormer: the Inception transformer, attention for low frequencies beside convolutions and pools for high ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, Share
from sfumato.foreign import read_tensors
from sfumato.nets.iformer import PLANS, IFormer, Plan, Ramp, blocks_of, load_published

from .base import Classifier
from .parts.mixing import cropped, erased, mixed
from .parts.randaugment import rand_augmented
from .parts.spectra import spectra
from .parts.standard import Standardised

Four = tuple[Count, Count, Count, Count]
FINE: dict[str, Any] = {
    "size": 384, "table": 224, "batch": 512, "lr": 1e-5, "warmup": 0, "final_lr": 0.1, "weight_decay": 1e-8,
    "mixup": 0.1, "cutmix": 0.1, "clip_norm": 1.0, "updates": 75_060, "cooldown": 25_020,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InceptionTransformer(Classifier):
    """iFormer-S, -B and -L, or a net of other numbers, trained as DeiT is.

    arXiv:2205.12956. In each block the first channels are high frequencies' (a depthwise convolution, and a max-pool),
    the last ones attend, over averages of 2x2 in the first two stages; the share that attends rises block by block
    (the frequency ramp). The card has the spectra of each way of every block. AdamW, a cosine of 300 epochs in 310 of
    1251 updates; random crops, mirrors, RandAugment, mixup or cutmix, erasing. Cost: 4.8, 9.4 and 14 GMACs a picture of
    224 pixels.

    Differs from the paper: as in the released code and weights, the two ways of high channels double their width and
    end with GELU, and layer scale is in stages 3 and 4 only. A crop or an erased box that would not fit is cut, not
    drawn anew; the rate moves with every update. "reversed" and "constant" ramps are reconstructed.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **Classifier.EXAMPLE, "depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12), "heads": (2, 2, 3, 3),
        "attention": (1, 1, 2, 2), "small": True, "lr": 0.01,
    }  # fmt: skip
    STARTS: ClassVar[frozenset[str]] = frozenset({"weights"})
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {"net": "base", "drop_path": 0.4, "final_lr": 0.01, "clip_norm": 1.0},
        "large": {"net": "large", "drop_path": 0.5, "final_lr": 0.01, "clip_norm": 1.0},
        "small-384": {**FINE, "net": "small", "drop_path": 0.3},
        "base-384": {**FINE, "net": "base", "drop_path": 0.5, "lr": 5e-6},
        "large-384": {**FINE, "net": "large", "drop_path": 0.6},
        "small-pictures": {
            "size": 32, "small": True, "depths": (1, 1, 3, 1), "dims": (32, 64, 96, 128), "heads": (2, 4, 6, 8),
            "attention": (1, 2, 4, 5, 5, 7), "drop_path": 0.0, "layer_scale": 1e-2, "updates": 2000, "batch": 64,
            "warmup": 100, "cooldown": 0, "lr": 2e-3, "final_lr": 0.01, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0,
            "magnitude": 0.0, "least_area": 0.5, "clip_norm": 1.0,
        },
    }  # fmt: skip
    """``base``, ``large``: the other nets at 224 pixels, as released. ``...-384``: fine-tuned from ``weights`` at 384.
    ``small-pictures``: for a CPU, untuned."""

    net: Literal["small", "base", "large"] = "small"
    """Which of the nets."""
    depths: Four | None = None
    """Blocks of each stage, by default as published; as what follows, of a net of your own."""
    dims: Four | None = None
    """Channels of each stage."""
    heads: Four | None = None
    """Heads that would fill the channels of each stage."""
    attention: tuple[Natural, ...] | None = None
    """Heads that attend, for each block; the channels that are left must be an even number."""
    ramp: Ramp = "published"
    """How the share that attends goes from block to block: as published, falling, constant, all or none."""
    drop_path: Decay = 0.2
    """Chance that the last block is left out of a picture; it rises from 0."""
    layer_scale: NotNegative = 1e-6
    """What the residuals of stages 3 and 4 are multiplied by at first."""
    small: bool = False
    """Halve the side once before the first stage, not twice, for small pictures."""
    table: Count | None = None
    """Side of the pictures that the tables of places are for, resized for others; by default ``size``. The released
    weights, those for 384 pixels too, have 224."""
    weights: Path | None = None
    """Released weights to start from, as a safetensors file; the last layer is fresh where it has other classes."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each channel of pixels in [0, 1], which is taken from them."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation, which they are then divided by."""
    least_area: Share = 0.08
    """Least share of a picture that a random crop shows; 1: no crops."""
    magnitude: NotNegative = 9.0
    """Mean level of RandAugment's two changes, out of 10; 0: none are made."""
    mixup: NotNegative = 0.8
    """alpha of mixup; 0: none."""
    cutmix: NotNegative = 1.0
    """alpha of cutmix; 0: none."""
    switch: Share = 0.5
    """Chance of cutmix rather than mixup."""
    erase: Share = 0.25
    """Chance that a box of a picture becomes noise."""
    first_lr: NotNegative = 1e-6
    """Learning rate at the start of the warm-up."""
    cooldown: Natural = 12_510
    """Updates at the end at the lowest rate, ``final_lr`` times the highest."""
    size: Count = 224
    flip: bool = True
    shift: Share = 0.0
    updates: Natural = 387_810
    batch: Count = 1024
    lr: Positive = 1e-3
    final_lr: NotNegative = 1e-3
    warmup: Natural = 6255
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NotNegative = 0.05
    clip_norm: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.small and self.weights is not None:
            raise BadInput("the released weights are for a stem that halves twice: leave small or weights out")
        if self.size <= (16 if self.small else 32):
            self.require_several("the last maps have one cell, which is normalised over pictures")
        blocks_of(self.numbers(), self.ramp)

    def numbers(self) -> Plan:
        """The net's."""
        known = PLANS[self.net]
        given = {"depths": self.depths, "dims": self.dims, "heads": self.heads, "attention": self.attention}
        return Plan(**{name: getattr(known, name) if part is None else tuple(part) for name, part in given.items()})

    def network(self, labels: tuple[str, ...]) -> nn.Module:
        table = self.table or self.size
        net = IFormer(
            self.numbers(), len(labels), table, self.ramp, self.drop_path, self.layer_scale, self.small
        )  # fmt: skip
        if self.weights is not None:
            state, _ = read_tensors(self.weights, "released weights")
            own = {f"head.{part}": x for part, x in net.head.state_dict().items()}
            other = any(key in state and state[key].shape != x.shape for key, x in own.items())
            load_published(net, {**state, **own} if other else state)
        return Standardised(net, self.mean, self.std)

    def augmented(self, x: Float[Tensor, "batch 3 size size"], rng: torch.Generator) -> Float[Tensor, "batch 3 s s"]:
        x = super().augmented(x, rng)
        x = cropped(x, self.least_area, rng) if self.least_area < 1 else x
        x = rand_augmented(x, self.magnitude, rng, fill=self.mean) if self.magnitude else x
        return erased(x, self.erase, (self.mean, self.std), rng) if self.erase else x

    def loss(
        self, net: nn.Module, x: Float[Tensor, "batch 3 size size"], y: Int[Tensor, "batch"], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, share = mixed(x, self.mixup, self.cutmix, self.switch, rng)
        logits = net(x).float()
        told = {"right": (logits.detach().argmax(1) == y).float().mean()}
        own, other = (cross_entropy(logits, labels, label_smoothing=self.label_smoothing) for labels in (y, y.flip(0)))
        return share * own + (1 - share) * other if share < 1 else own, told

    def rate(self) -> Callable[[int], float]:
        whole, least = max(1, self.updates - self.cooldown), self.final_lr * self.lr

        def at(step: int) -> float:
            if step < self.warmup:
                return self.first_lr + (self.lr - self.first_lr) * step / self.warmup
            return least + (self.lr - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / whole)))

        return at

    def figures(self, net: nn.Module, pictures: Pictures) -> dict[str, Any]:
        """Beside the usual ones, the `spectra` of up to 32 pictures."""
        rows = range(min(32, self.batch, len(pictures)))
        x = to_tensor([pictures.picture(row) for row in rows]).to(next(net.parameters()).device)
        return super().figures(net, pictures) | {"spectra": spectra(net.net, net.seen(x))}
