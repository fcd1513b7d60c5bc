"""Latents of pictures of any size, and how far a change of pixels moves them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.pipeline import Text2Image


def padded(x: Float[Tensor, "n 3 height width"], unit: int) -> Float[Tensor, "n 3 h w"]:
    """The pictures with their last rows and columns repeated until both sides are multiples of ``unit``."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % unit, 0, -height % unit), mode="replicate")


def displacement(
    p: Text2Image, moved: Float[Tensor, "n 3 height width"], clean: Float[Tensor, "n 3 height width"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """How far latents (posterior means) of pictures in [0, 1] have moved: Euclidean norm, and largest single change."""
    unit = p.codec.factor * p.codec.multiple
    with torch.no_grad():
        far, near = (p.posterior(padded((2 * x - 1).to(p.device), unit))[0] for x in (moved, clean))
    gap = (far - near).flatten(1).double().cpu()
    return gap.norm(dim=1), gap.abs().amax(1)


def noised(
    pictures: Float[Tensor, "n 3 height width"], budget: int, seed: int = 0
) -> Float[Tensor, "n 3 height width"]:
    """The control: every value moved by ``budget`` levels up or down by chance, in [0, 1]."""
    flips = torch.rand(pictures.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return (pictures + torch.where(flips, -1.0, 1.0).to(pictures) * budget / 255).clamp(0, 1)
