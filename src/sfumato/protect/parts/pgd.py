"""Signed gradient steps inside a box around a picture, and the same box in whole levels of a file."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

SLACK = 1e-4
"""Levels by which rounding in float32 may miss a whole number."""


def pgd(
    x: Float[Tensor, "n channel height width"],
    direction: Callable[[Tensor], Tensor],
    *,
    eps: float,
    alpha: float,
    updates: int,
    start: Float[Tensor, "n channel height width"] | None = None,
    decay: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Float[Tensor, "n channel height width"]:
    """``updates`` steps x <- clip(x + alpha sign(direction(x))), never further than ``eps`` from where it began.

    After every step |x - x_0| <= eps and x lies in [-1, 1]; with eps = 0 the result is ``x`` bit for bit. The sign
    makes it independent of the direction's scale, and of how many pictures a loss sums.

    Args:
        x: pictures in [-1, 1].
        direction: where to go from pictures; positive where a value is to rise.
        eps, alpha: largest change and step, in the scale of ``x`` (2 / 255 is one level of a file).
        start: where to begin, as a change of ``x``; it is clipped like a step.
        decay: step k of K has alpha (1 - 0.99 k / K) instead.
        advance: called after every step.
    """
    low, high = (x - eps).clamp(-1, 1), (x + eps).clamp(-1, 1)
    now = x if start is None else (x + start).clamp(low, high)
    for k in range(updates):
        step = alpha * (1 - 0.99 * k / updates) if decay else alpha
        now = (now + step * direction(now).sign()).clamp(low, high)
        advance()
    return now


def to_levels(
    moved: Float[Tensor, "n channel height width"], clean: Float[Tensor, "n channel height width"], budget: int
) -> Float[Tensor, "n channel height width"]:
    """``moved`` as a file holds it, in whole 255ths, none further than ``budget`` of them from ``clean``.

    Rounded to the nearest level, then held in the box: of clean pictures that come from a file the levels themselves
    differ by at most ``budget``, exactly. Both in [0, 1]; the result has the type of ``clean``.
    """
    levels = 255 * clean.double()
    low, high = (levels - budget - SLACK).ceil().clamp_min(0), (levels + budget + SLACK).floor().clamp_max(255)
    return (torch.minimum(torch.maximum((255 * moved.double()).round(), low), high) / 255).to(clean)
