"""Blurring diffusion (arXiv:2209.05557): destroy pictures by blurring and by noise at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sfumato.fields import Count, Decay, NotNegative, Positive
from sfumato.nets import UNet
from sfumato.noise import BlurringProcess, Cosine

from .pixels import PixelRecipe


@dataclass(frozen=True, kw_only=True)
class Blurring(PixelRecipe):
    """A pixel-space diffusion model whose low frequencies are destroyed last, so that they are drawn first.

    The process is `sfumato.noise.BlurringProcess` (arXiv:2209.05557, section 4), the loss the plain squared error of
    the predicted noise, in pixels, at uniform times, and sampling draws from the exact posterior, whose variance
    differs from frequency to frequency. ``sigma_blur_max=0`` is plain Gaussian diffusion with the same network.

    Cost: that of plain pixel diffusion, and two cosine transforms a step (two small matrix products each). By the
    paper it is ahead of plain diffusion after long training; in short runs it is not.

    Differs from the paper: while the saved model samples, each frequency of the predicted picture is held to what
    pictures within [-1, 1] can have of it, because dividing by the small alphas of high frequencies magnifies errors;
    `ImageModel.defaults` switches that off. The preset "cifar10" has the sizes that the paper is reported to have used
    (unconfirmed).
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {**PixelRecipe.EXAMPLE, "channels": (8, 8), "layers": 1, "attention": (4,)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "cifar10": {
            "size": 32,
            "channels": (256, 256, 256),
            "layers": 3,
            "attention": (16, 8),
            "dropout": 0.2,
            "batch": 128,
            "lr": 2e-4,
            "updates": 2_000_000,
            "flip": True,
        },
    }

    sigma_blur_max: NotNegative = 20.0
    """Standard deviation of the largest blur in pixels; 0 is no blur."""
    d_min: Positive = 0.001
    """What blurring leaves of the highest frequencies."""
    logsnr_min: float = -10.0
    """Log-SNR of the noisiest pictures (of their mean intensity, which does not blur)."""
    logsnr_max: float = 10.0
    """Log-SNR of the cleanest pictures."""
    prediction: Literal["eps", "x0"] = "eps"  # type: ignore[misc]  # a choice here, a constant elsewhere
    """What the network predicts, and whose plain squared error is the loss; by the paper the noise is better."""
    channels: tuple[Count, ...] = (64, 128, 128)
    """Channels of the U-Net's levels, each at half the side of the one before."""
    layers: Count = 2
    """Residual blocks of a level."""
    attention: tuple[Count, ...] = (16, 8)
    """Sides at which there is self-attention."""
    dropout: Decay = 0.1
    """Dropout in all residual blocks."""
    lr: Positive = 2e-4
    """Learning rate."""

    def process(self) -> BlurringProcess:
        return BlurringProcess(Cosine(self.logsnr_min, self.logsnr_max), None, self.sigma_blur_max, self.d_min)

    def network(self, classes: int) -> UNet:
        return UNet(self.size, 3, classes, self.channels, self.layers, self.attention, self.dropout)

    @property
    def compared(self) -> Literal["eps", "x0"]:
        return self.prediction
