"""The mathematics of training by rectified flow with noise at t = 0 and data at t = 1, as OmniGen counts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def between(
    x1: Float[Tensor, "batch *dims"], x0: Float[Tensor, "batch *dims"], t: Float[Tensor, "batch"]
) -> tuple[Float[Tensor, "batch *dims"], Float[Tensor, "batch *dims"]]:
    """t x1 + (1 - t) x0 between noise x0 (t = 0) and data x1 (t = 1), and the velocity x1 - x0."""
    t = t.reshape(-1, *[1] * (x1.ndim - 1)).to(x1)
    return t * x1 + (1 - t) * x0, x1 - x0


def velocity_loss(
    guess: Float[Tensor, "batch *dims"],
    x1: Float[Tensor, "batch *dims"],
    x0: Float[Tensor, "batch *dims"],
    weight: Float[Tensor, "batch *dims"] | None = None,
) -> Float[Tensor, "batch"]:
    """The mean over each row of ``weight`` times the squared error of the velocity x1 - x0."""
    error = (guess - (x1 - x0)).square()
    return (error if weight is None else weight * error).flatten(1).mean(1)


def emphasis(after: Float[Tensor, "*dims"], before: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """Loss weights of an edit, of its latent ``after`` and the input's latent ``before``.

    With d = |after - before| and m its mean: all 0 where m < 0.001 (nothing was edited); where m <= 0.8,
    min(max(1 / (m + 1e-6), 5), 64) where d > 0.3 and 1 elsewhere; else all 1.
    """
    d = (after - before).abs()
    m = d.mean()
    strong = torch.where(d > 0.3, (1 / (m + 1e-6)).clamp(5, 64), 1.0)
    weight = torch.where(m <= 0.8, strong, torch.ones_like(d))
    return torch.where(m < 0.001, torch.zeros_like(d), weight)
