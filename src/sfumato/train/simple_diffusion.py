"""Simple diffusion: one pixel-space model at any resolution, by moving the schedule and the capacity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffusers import ModelMixin
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural
from sfumato.nets import SimpleUNet, SimpleUViT
from sfumato.noise import Denoiser

from .cosine import CosineRecipe

_IMAGENET = {
    "label_dropout": 0.1, "flip": True, "batch": 2048, "lr": 1e-4, "warmup": 10_000, "ema": 0.9999,
    "precision": "bf16", "embedding": 1024,
}  # fmt: skip
_UNET = {
    **_IMAGENET, "backbone": "unet", "channels": (128, 256, 512, 1024, 1024), "blocks": (3, 4, 4, 12, 4),
    "dropout": 0.1,
}  # fmt: skip
_UVIT = {
    **_IMAGENET, "backbone": "uvit", "channels": (128, 256, 512), "blocks": (2, 2, 2), "depth": 36, "width": 2048,
    "head_dim": 128, "dropout": 0.2,
}  # fmt: skip
_WIDE = {"size": 512, "noise": "interpolated", "multiscale": True, "factor": 4, "save_memory": True}
_SMALL = {"batch": 64, "warmup": 200, "ema": 0.999, "lr": 1e-3, "dropout": 0.0, "sampling_steps": 128}


@dataclass(frozen=True, kw_only=True)
class SimpleDiffusion(CosineRecipe):
    """Pixel-space diffusion under a schedule that follows the resolution, with the capacity at 16x16.

    arXiv:2301.11093: the cosine schedule moved by 2 log(noise_size / size) in log-SNR (section 3.1), or interpolated
    between two such moves; a U-Net with most blocks at 16x16, or the U-ViT with a transformer there (3.2); dropout
    where feature maps have a side of at most 16 (3.3); wavelets or patches instead of full-resolution feature maps
    (3.4); and, with ``multiscale``, the loss repeated on averaged pictures (section 3.1, "multiscale training loss").
    The network predicts v; the loss is the plain error of eps, which is alpha^2 times that of v.

    Presets named after ImageNet are the paper's models as far as published tables tell: schedules, drop-out, patch 2
    at 256 px, 36 blocks of width 2048; blocks and channels of the levels are reconstructed (with them the U-ViT at
    256 px costs 551 GFLOP a picture, a later paper's table says 555). Presets for small machines are untuned.
    Cost: one network call with gradients per update.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **CosineRecipe.EXAMPLE, "noise_size": 8, "channels": (8,), "blocks": (1,), "depth": 1, "width": 16,
        "head_dim": 8, "embedding": 16, "sampling_steps": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "imagenet-128-unet": {**_UNET, "size": 128, "updates": 1_500_000},
        "imagenet-128-uvit": {**_UVIT, "size": 128, "updates": 500_000},
        "imagenet-256-unet": {**_UNET, "size": 256, "factor": 2, "updates": 2_000_000},
        "imagenet-256-uvit": {**_UVIT, "size": 256, "factor": 2, "updates": 500_000},
        "imagenet-512-unet": {**_UNET, **_WIDE, "updates": 2_000_000},
        "imagenet-512-uvit": {**_UVIT, **_WIDE, "updates": 500_000},
        "small-cifar10": {
            **_SMALL, "size": 32, "factor": 2, "channels": (64,), "blocks": (1,), "depth": 4, "width": 192,
            "head_dim": 48, "flip": True, "updates": 10_000,
        },
        "small-digits": {
            **_SMALL, "size": 8, "noise_size": 8, "channels": (32,), "blocks": (1,), "depth": 3, "width": 96,
            "head_dim": 32, "embedding": 128, "updates": 3000,
        },
        "small-sketch": {
            **_SMALL, "size": 64, "factor": 2, "channels": (48,), "blocks": (1,), "depth": 4, "width": 192,
            "head_dim": 48, "updates": 10_000,
        },
    }  # fmt: skip
    """``imagenet-*``: the paper's models (see the class); ``small-*``: for a CPU, untuned."""

    backbone: Literal["uvit", "unet"] = "uvit"
    """"uvit": convolutions, then a transformer; "unet": convolutions on all levels."""
    channels: tuple[Count, ...] = (64,)
    """Channels of the convolutional levels, the finest first."""
    blocks: tuple[Natural, ...] = (2,)
    """Residual blocks of each, on the way down and again on the way up."""
    depth: Natural = 6
    """Transformer blocks of the U-ViT."""
    width: Count = 256
    """Width of the transformer."""
    head_dim: Count = 64
    """Channels of an attention head."""
    embedding: Count = 256
    """Width of the embedding of log-SNR and class."""
    attention: tuple[Count, ...] = (16, 8)
    """Sides of feature maps at which the U-Net has self-attention."""
    dropout: Decay = 0.1
    """Dropout where a feature map's side is at most ``dropout_from``."""
    dropout_from: Natural = 16
    """Largest side with dropout."""
    factor: Count = 1
    """1, 2 or 4: how many times smaller than the picture the first feature map is."""
    front: Literal["5/3", "haar", "conv"] = "5/3"
    """How it gets smaller: wavelets (5/3 or Haar), or patches by convolution."""
    multiscale: bool = False
    """Repeat the loss on averaged pictures; the paper found it to help from 512 pixels on."""
    multiscale_from: Count = 32
    """Side of the smallest averaged picture."""
    save_memory: bool = False
    """Compute activations twice instead of keeping them."""

    def network(self, classes: int) -> ModelMixin:
        common = {
            "size": self.size, "classes": classes, "channels": self.channels, "blocks": self.blocks,
            "head_dim": self.head_dim, "embedding": self.embedding, "dropout": self.dropout,
            "dropout_from": self.dropout_from, "factor": self.factor, "front": self.front,
        }  # fmt: skip
        if self.backbone == "unet":
            net = SimpleUNet(**common, attention=self.attention)
        else:
            net = SimpleUViT(**common, depth=self.depth, width=self.width)
        if self.save_memory:
            net.enable_gradient_checkpointing()
        return net

    def loss(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, eps: Tensor, cond: Tensor | None
    ) -> Float[Tensor, "batch"]:
        process = denoiser.process
        z = process.diffuse(x, t, eps)
        residual = process.convert(denoiser(z, t, cond), z, t, denoiser.prediction, "eps") - eps
        if self.multiscale:
            return multiscale(residual, self.multiscale_from)
        return residual.square().flatten(1).mean(1)


def multiscale(residual: Float[Tensor, "batch channel side side"], smallest: int = 32) -> Float[Tensor, "batch"]:
    """Sum over s in {smallest, 2 smallest, ..., side} of (1 / s) times the mean square of the residual averaged to s.

    The paper's multiscale loss: averaging is linear, so the residual is averaged once a level, not both pictures.
    Where the side is ``smallest`` or less there is one term.

    Raises:
        BadInput: the side is no ``smallest`` times a power of two.
    """
    side = residual.shape[-1]
    if side > smallest and (side % smallest or (side // smallest).bit_count() != 1):
        raise BadInput(f"the multiscale loss halves the side down to {smallest}, which {side} does not allow")
    total = residual.square().flatten(1).mean(1) / side
    while side > smallest:
        side, residual = side // 2, avg_pool2d(residual, 2)
        total = total + residual.square().flatten(1).mean(1) / side
    return total
