"""Gradient surgery: what of one gradient opposes another is taken out."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.train.recipe import Gradients

Surgery = Literal["tensor", "joint", "official", "none"]


def operated(
    a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], weight: float = 1.0, official: bool = False
) -> Float[Tensor, "*shape"]:
    """The unlearning gradient ``a`` less what of it opposes the retaining gradient ``b``: where <a, b> < 0,

    a - weight <a, b> / |b|^2 b, else ``a`` itself. With weight 1, <a, b> is 0 afterwards.

    Args:
        official: as in the published code, weight cos(a, b) b / |b| is subtracted, which is this where |a| = 1; what is
            left is <a', b> = (|a| - 1) / |a| <a, b>.
    """
    if official:
        direction = b / (b.norm() + 1e-8)
        dot = ((a / (a.norm() + 1e-8)) * direction).sum()
        return torch.where(dot < 0, a - weight * dot * direction, a)
    dot, square = (a * b).sum(), b.square().sum()
    # A product below zero whose square underflows to zero is nothing to take out.
    share = torch.where((dot < 0) & (square > 0), dot / torch.where(square > 0, square, 1), 0)
    return torch.where(share < 0, a - weight * share * b, a)


def surgery(a: Gradients, b: Gradients, mode: Surgery, weight: float = 1.0) -> Gradients:
    """`operated` for every tensor by itself ("tensor", "official"), or for all of them as one vector ("joint")."""
    shared = [name for name in a if name in b]
    if mode == "joint":
        flat_a, flat_b = (torch.cat([g[name].flatten() for name in shared]) for g in (a, b))
        parts = operated(flat_a, flat_b, weight).split([a[name].numel() for name in shared])
        return a | {name: part.view_as(a[name]) for name, part in zip(shared, parts, strict=True)}
    return a | {name: operated(a[name], b[name], weight, mode == "official") for name in shared}


def clipped(gradients: Gradients, norm: float) -> Gradients:
    """All gradients together scaled by min(1, norm / (|all| + 1e-6)); ``norm`` 0: as they are."""
    if not norm or not gradients:
        return gradients
    total = torch.nn.utils.get_total_norm(gradients.values())
    return {name: g * (norm / (total + 1e-6)).clamp(max=1) for name, g in gradients.items()}
