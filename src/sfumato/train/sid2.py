"""SiD2: pixel-space diffusion with the sigmoid loss, the Residual U-ViT, and guidance in an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import ModelMixin
from jaxtyping import Float
from torch import Tensor

from sfumato.fields import Count, Decay, Natural, within
from sfumato.nets import ResidualUViT
from sfumato.noise import Denoiser

from .cosine import CosineRecipe

_PUBLISHED = {
    "channels": (128, 256, 512, 1024), "kinds": ("res", "res", "transformer", "transformer"), "blocks": (3, 3, 3),
    "middle": 16, "embedding": 1024, "noise": "cosine", "flip": True, "batch": 2048, "lr": 1e-4, "warmup": 10_000,
    "ema": 0.9999, "updates": 1_000_000, "precision": "bf16",
}  # fmt: skip
_INTERVAL = {"cfg_scale": 2.0, "cfg_interval": (-0.95, 3.32)}
"""Noise levels 0.19 to 1.61 of arXiv:2404.07724, as log-SNRs: where its grid search for a latent model began."""
_SMALL = {
    "batch": 64, "warmup": 200, "ema": 0.999, "lr": 1e-3, "dropout": 0.0, "noise": "cosine", "sampling_steps": 128,
    "cfg_scale": 1.5, "cfg_interval": (-3.0, 3.0),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SiD2(CosineRecipe):
    """Simpler Diffusion: the loss weighted by sigmoid(bias - logsnr), the Residual U-ViT, guidance in an interval.

    arXiv:2410.19324. Loss: 1/2 E_t[w(lambda) (-dlambda/dt) ||eps - eps_hat||^2], w(lambda) = sigmoid(bias - lambda)
    (section 3.1), with the mean over pixels for the norm, and computed in x-space in float32. It depends on w alone:
    the schedule only changes the gradient's variance, and the end points where it stops. ``bias`` falls with the
    resolution, since detail that nobody sees should not be learned. Network: section 3.2, "flop-heavy" where
    ``patch`` is small. Guidance within log-SNRs: arXiv:2404.07724.

    Presets named after ImageNet: ``bias`` as quoted from the appendix by independent trainers; the channels and
    blocks of two public ports, with which patches of 2 and 1 at 256 px cost 138 and 656 GFLOP a picture, where a
    later paper's table says 137 and 653; schedule of 512 px from the appendix; optimiser and batch unconfirmed.
    Presets for small machines are untuned. The optional distillation of the paper's section 4 is a method of its own,
    multistep moment matching (arXiv:2406.04103), and not in this recipe.
    Cost: one network call with gradients per update.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **CosineRecipe.EXAMPLE, "channels": (8, 16), "kinds": ("res", "transformer"), "blocks": (1,), "middle": 1,
        "head_dim": 8, "embedding": 16, "sampling_steps": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "imagenet-128": {**_PUBLISHED, **_INTERVAL, "size": 128, "patch": 1, "bias": 0.0},
        "imagenet-256-patch2": {**_PUBLISHED, **_INTERVAL, "size": 256, "patch": 2, "bias": -1.0},
        "imagenet-256": {**_PUBLISHED, **_INTERVAL, "size": 256, "patch": 1, "bias": -1.0, "save_memory": True},
        "imagenet-512": {
            **_PUBLISHED, **_INTERVAL, "size": 512, "patch": 2, "bias": -3.0, "noise": "interpolated",
            "save_memory": True,
        },
        "small-cifar10": {
            **_SMALL, "size": 32, "patch": 2, "channels": (48, 96, 192), "kinds": ("res", "transformer", "transformer"),
            "blocks": (1, 1), "middle": 2, "head_dim": 48, "flip": True, "updates": 5000,
        },
        "small-digits": {
            **_SMALL, "size": 8, "channels": (32, 96), "kinds": ("res", "transformer"), "blocks": (1,), "middle": 3,
            "head_dim": 32, "embedding": 128, "updates": 3000,
        },
        "small-sketch": {
            **_SMALL, "size": 64, "patch": 4, "channels": (48, 96, 192), "kinds": ("res", "transformer", "transformer"),
            "blocks": (1, 1), "middle": 4, "head_dim": 48, "bias": -1.0, "updates": 7500,
        },
    }  # fmt: skip
    """``imagenet-*``: the paper's models (see the class), "flop-heavy" where the patch is half of the other's;
    ``small-*``: for a CPU, untuned."""

    bias: Annotated[float, within(-50, 50)] = 0.0
    """b of the loss weight sigmoid(b - logsnr); 0 at 128 px, -1 at 256, -3 at 512 in the paper."""
    loss_weight: Literal["sigmoid", "elbo", "eps"] = "sigmoid"
    """"sigmoid"; "elbo": no weight (the limit of a large bias); "eps": plain error of the noise, to compare with."""
    prediction: Literal["v", "eps"] = "v"  # type: ignore[misc]  # a choice here, a constant elsewhere
    """What the network predicts."""
    patch: Count = 1
    """Side of the squares of pixels that become one vector: 1, 2 or 4; half of it is four times the work."""
    channels: tuple[Count, ...] = (64, 128, 256)
    """Channels of the levels, the last one is the middle."""
    kinds: tuple[Literal["res", "transformer"], ...] = ("res", "transformer", "transformer")
    """Blocks of each level."""
    blocks: tuple[Natural, ...] = (2, 2)
    """Blocks on the way down and again on the way up, of each level but the middle."""
    middle: Natural = 4
    """Blocks of the middle."""
    head_dim: Count = 64
    """Channels of an attention head."""
    embedding: Count = 256
    """Width of the embedding of log-SNR and class."""
    dropout: Decay = 0.1
    """Dropout in the transformer blocks."""
    conditioned: bool = True
    """Modulate every block by log-SNR and class; otherwise they enter once."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Positions of the transformer blocks."""
    save_memory: bool = False
    """Compute activations twice instead of keeping them."""

    def network(self, classes: int) -> ModelMixin:
        net = ResidualUViT(
            self.size, 3, classes, self.patch, self.channels, self.kinds, self.blocks, self.middle, self.head_dim,
            self.embedding, self.dropout, self.conditioned, self.positions,
        )  # fmt: skip
        if self.save_memory:
            net.enable_gradient_checkpointing()
        return net

    def loss(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, eps: Tensor, cond: Tensor | None
    ) -> Float[Tensor, "batch"]:
        if self.loss_weight == "eps":
            return super().loss(denoiser, x, t, eps, cond)
        process = denoiser.process
        z = process.diffuse(x, t, eps)
        x0 = process.convert(denoiser(z, t, cond), z, t, denoiser.prediction, "x0")
        error = (x0 - x).square().flatten(1).mean(1)
        logsnr, slope = process.schedule.logsnr(t), process.schedule.dlogsnr_dt(t)
        bias = self.bias if self.loss_weight == "sigmoid" else None
        return (-slope / 2 * x_weight(logsnr, bias)).to(error) * error


def eps_weight(logsnr: Float[Tensor, "..."], bias: float | None) -> Float[Tensor, "..."]:
    """w(lambda) = sigmoid(bias - lambda), the weight of the noise's squared error; None: 1, the likelihood's."""
    return torch.ones_like(logsnr) if bias is None else torch.sigmoid(bias - logsnr)


def x_weight(logsnr: Float[Tensor, "..."], bias: float | None) -> Float[Tensor, "..."]:
    """The same weight for the squared error of x0: exp(lambda) w(lambda) = exp(bias) sigmoid(lambda - bias)."""
    return torch.exp(logsnr) if bias is None else math.exp(bias) * torch.sigmoid(logsnr - bias)
