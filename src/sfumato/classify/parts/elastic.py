"""Elastic deformation of pictures (Simard, Steinkraus and Platt 2003)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

TRUNCATE = 4.0
"""The Gaussian's radius in standard deviations."""


def blur(side: int, sigma: float, dtype: torch.dtype = torch.float64) -> Float[Tensor, "side side"]:
    """The matrix that filters a row of ``side`` values with a normalised Gaussian, zero beyond its ends."""
    radius = int(TRUNCATE * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    apart = torch.arange(side)[:, None] - torch.arange(side) + radius
    inside = (apart >= 0) & (apart <= 2 * radius)
    return torch.where(inside, kernel[apart.clamp(0, 2 * radius)], 0.0).to(dtype)


def elastic(
    x: Float[Tensor, "n c h w"], noise: Float[Tensor, "n 2 h w"], sigma: float = 4.0, alpha: float = 20.0
) -> Float[Tensor, "n c h w"]:
    """Pictures drawn anew from (row + dx, column + dy), where (dx, dy) is ``alpha`` times the blurred noise.

    A point outside of [0, h - 1] x [0, w - 1] gives 0, and is not blended with what is inside.

    Args:
        noise: uniform in [-1, 1]; dx, then dy.
        sigma: of the Gaussian, in pixels.
        alpha: in pixels.
    """
    height, width = x.shape[-2:]
    rows, columns = (blur(side, sigma, x.dtype).to(x.device) for side in (height, width))
    moved = alpha * (rows @ noise.to(x) @ columns.mT)
    at = [torch.arange(side, dtype=x.dtype, device=x.device) for side in (height, width)]
    down, across = at[0][:, None] + moved[:, 0], at[1] + moved[:, 1]
    inside = (down >= 0) & (down <= height - 1) & (across >= 0) & (across <= width - 1)
    # grid_sample blends with what it takes to be beyond the border: hence the mask
    grid = torch.stack([2 * across / max(1, width - 1) - 1, 2 * down / max(1, height - 1) - 1], dim=-1)
    drawn = grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return drawn * inside[:, None]
