"""One noisy picture at several resolutions: averages of blocks, and the noise that they have left.

x_t = alpha x0 + sigma eps. The mean over a block of n elements has the noise sigma / s with s = sqrt(n), so it is as
noisy as a whole picture at the time tau whose log-SNR is lambda(tau) = lambda(t) + 2 log s (arXiv:2401.10247,
arXiv:2404.01709).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.noise.schedule import Path, Time, float64

AXES = (-4, -2, -1)
"""Frame, height and width of frames; pictures have the last two."""


def spread(factors: Sequence[int]) -> float:
    """s, by which averaging blocks of these sides divides the standard deviation of white noise."""
    return math.sqrt(math.prod(factors))


def pooled(x: Float[Tensor, "*dims"], factors: Sequence[int]) -> Float[Tensor, "*smaller"]:
    """D: the mean over blocks of (height, width) or (frame, height, width) elements; 1 leaves an axis alone.

    No other way of making it smaller will do: interpolation correlates the noise.

    Raises:
        BadInput: a side that is no multiple of its factor.
    """
    for axis, factor in zip(AXES[-len(factors) :], factors, strict=True):
        if x.shape[axis] % factor:
            side = x.shape[axis]
            raise BadInput(f"a side of {side} is no multiple of {factor}: ask for a size that is, or another scale")
        if factor > 1:
            x = x.unflatten(axis, (-1, factor)).mean(axis)
    return x


def repeated(x: Float[Tensor, "*smaller"], factors: Sequence[int]) -> Float[Tensor, "*dims"]:
    """U: every element as a block of these sides; ``pooled(repeated(x, f), f)`` is ``x``."""
    for axis, factor in zip(AXES[-len(factors) :], factors, strict=True):
        x = x.repeat_interleave(factor, dim=axis) if factor > 1 else x
    return x


def matched_logsnr(logsnr: Time, s: float) -> Float[Tensor, "..."]:
    """The log-SNR of block means whose noise is s times less: lambda + 2 log s, in float64."""
    return float64(logsnr) + 2 * math.log(s)


def matched_alpha_bar(alpha_bar: Time, s: float) -> Float[Tensor, "..."]:
    """The same as alpha_bar = alpha^2 of a variance-preserving process: s^2 a / (1 + (s^2 - 1) a), in float64."""
    a = float64(alpha_bar)
    return s**2 * a / (1 + (s**2 - 1) * a)


def power(alpha_bar: Time, s: float) -> Float[Tensor, "..."]:
    """P = a + (1 - a) / s^2, the variance of the block means of unit-variance blocks, in float64."""
    a = float64(alpha_bar)
    return a + (1 - a) / s**2


def rescaling(
    alpha: Float[Tensor, "..."], sigma: Float[Tensor, "..."], s: float, path: Path
) -> Float[Tensor, "..."]:
    """What block means alpha x0 + (sigma / s) eps are multiplied by to be a legal input of the model.

    On a variance-preserving path 1 / sqrt(P), on a flow 1 / (alpha + sigma / s), and 1 where alpha is always 1.
    """
    if path == "vp":
        return 1 / torch.sqrt(alpha**2 + (sigma / s) ** 2)
    return 1 / (alpha + sigma / s) if path == "flow" else torch.ones_like(alpha)


def nearest_step(table: Float[Tensor, "steps"], logsnr: Float[Tensor, "..."]) -> Tensor:
    """The training step whose log-SNR in ``table`` is nearest, the first of several that are as near."""
    away = (table - logsnr[..., None]).abs()
    away = torch.where(away.isnan(), 0.0, away)  # a table that ends without any signal, at its end
    steps = torch.arange(len(table), device=table.device).expand_as(away)
    return torch.where(away == away.amin(-1, keepdim=True), steps, len(table)).amin(-1)
