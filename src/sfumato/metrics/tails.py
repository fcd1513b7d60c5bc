"""How heavy the tails of numbers are, and what outliers do to the temporal differences of consistency training.

arXiv:2502.01441, section on latents: rare, very large values of latents become rare, very large differences between
neighbouring noise levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Tails:
    """A box plot in numbers.

    Attributes:
        low, median, high: the quartiles.
        inner, outer: the fences (below, above): 1.5 and 3 times the range between the quartiles away from them.
        outside, far: the shares of the numbers beyond them; of normal ones 0.7 % and 2.3 in a million.
        least, most: the extremes.
        kurtosis: the excess kurtosis; 0 is a normal law's.
    """

    low: float
    median: float
    high: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    outside: float
    far: float
    least: float
    most: float
    kurtosis: float


def tails(values: Float[Tensor, "..."]) -> Tails:
    """The `Tails` of all numbers of a tensor together, in float64. Cost: a sort."""
    x = values.detach().double().flatten().cpu().numpy()
    low, median, high = (float(q) for q in np.quantile(x, [0.25, 0.5, 0.75]))
    away = high - low
    inner, outer = ((low - k * away, high + k * away) for k in (1.5, 3.0))
    share = lambda fence: float(((x < fence[0]) | (x > fence[1])).mean())
    centred = x - x.mean()
    variance = float((centred**2).mean())
    kurtosis = float((centred**4).mean()) / variance**2 - 3 if variance else 0.0
    return Tails(
        low, median, high, inner, outer, share(inner), share(outer), float(x.min()), float(x.max()), kurtosis
    )  # fmt: skip


def posterior_mean(
    z: Float[Tensor, "batch *dims"], sigma: Float[Tensor, "batch"], data: Float[Tensor, "n *dims"]
) -> Float[Tensor, "batch *dims"]:
    """E[x | x + sigma noise = z] where x is one of ``data``, all alike likely: the ideal denoiser of a finite set."""
    distance = torch.cdist(z.flatten(1).double(), data.flatten(1).double()).square()
    weight = torch.softmax(-distance / (2 * sigma.double()[:, None] ** 2), dim=1)
    return (weight @ data.flatten(1).double()).view_as(z).to(z.dtype)


def temporal_differences(
    f: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "batch *dims"],
    noise: Float[Tensor, "batch *dims"],
    high: Float[Tensor, "batch"],
    low: Float[Tensor, "batch"],
) -> Float[Tensor, "batch *dims"]:
    """f(x + t noise, t) - f(x + s noise, s) at neighbouring noise levels t = ``high`` and s = ``low``."""
    shape = (-1, *[1] * (x.ndim - 1))
    return f(x + high.view(shape) * noise, high) - f(x + low.view(shape) * noise, low)
