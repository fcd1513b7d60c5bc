"""The mathematics of consistency training: grids, curricula and losses of iCT and of sLCT, and its coupling.

iCT: arXiv:2310.14189. sLCT: arXiv:2502.01441. Indices count from the noisiest level: j = 0 is t_max, j = N - 1 t_min.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfumato.errors import BadInput

Robust = Literal["cauchy", "pseudo-huber", "geman-mcclure", "l2"]
Reduction = Literal["mean", "sum", "element"]


def levels_at(step: int, updates: int, first: int = 10, last: int = 640) -> int:
    """N(k), the levels of the grid at update k: ``first`` doubled at equal intervals to ``last``, plus 1 (iCT).

    N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2 floor(s1 / s0) + 1)).
    """
    each = max(1, math.floor(updates / (math.log2(last // first) + 1)))
    return min(first * 2 ** min(step // each, 64), last) + 1


def noise_levels(n: int, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0) -> Float[Tensor, "n"]:
    """t_0 = ``t_max`` > ... > t_{n-1} = ``t_min``, equally far apart in t^(1 / rho), float64."""
    low, high = t_min ** (1 / rho), t_max ** (1 / rho)
    return (high + torch.arange(n, dtype=torch.float64) / (n - 1) * (low - high)) ** rho


def index_law(levels: Float[Tensor, "n"], mean: float = -1.1, std: float = 2.0) -> Float[Tensor, "n-1"]:
    """The probability of the pair (t_j, t_{j+1}): what a normal law of ln t has between them, normalised."""
    place = torch.erf((levels.log() - mean) / (math.sqrt(2) * std))
    law = place[:-1] - place[1:]
    return law / law.sum()


def draw_indices(law: Float[Tensor, "n-1"], uniform: Float[Tensor, "batch"]) -> Int[Tensor, "batch"]:
    """The indices at which the distribution function of ``law`` reaches the ``uniform`` numbers in [0, 1)."""
    edges = law.double().cumsum(0)
    return torch.searchsorted(edges / edges[-1], uniform.double().contiguous(), right=True).clamp(max=len(law) - 1)


def loss_scale(
    levels: int, dimensions: int, first: int = 10, c0: float | None = None, adaptive: bool = True,
    slope: float = 1.15, offset: float = 0.85,
) -> float:  # fmt: skip
    """c of the robust losses: 0.00054 sqrt(d) on the first grid, exp(-slope ln(N - 1) - offset) on finer ones.

    The formula is the authors' code's, fitted to latents with d = 4096; a variant (1.18, 0.72) that is remembered from
    the paper's text is unconfirmed. A ``c0`` of one's own replaces the first value, and scales the others alike.

    Args:
        levels: N.
        dimensions: d, elements of a latent.
        first: s0 of the curriculum.
        adaptive: whether c follows N; else it is that of the first grid.
    """
    base = 0.00054 * math.sqrt(dimensions) if c0 is None else c0
    if not adaptive or levels <= first + 1:
        return base
    scale = 1.0 if c0 is None else c0 / (0.00054 * 64)
    return scale * math.exp(-slope * math.log(levels - 1) - offset)


def robust(
    difference: Float[Tensor, "batch *dims"], c: float, kind: Robust = "cauchy", reduction: Reduction = "mean"
) -> Float[Tensor, "batch"]:
    """The loss of each sample of r^2 = its mean square (or sum of squares, or element by element and averaged).

    "cauchy": log(1 + r^2 / (2 c^2)); "pseudo-huber": sqrt(r^2 + c^2) - c; "geman-mcclure": r^2 / (r^2 + 4 c^2) (the
    published code has a factor of 2 before it); "l2": r^2.
    """
    squares = difference.flatten(1).square()
    r2 = squares if reduction == "element" else squares.sum(1) if reduction == "sum" else squares.mean(1)
    if kind == "cauchy":
        loss = torch.log1p(r2 / (2 * c**2))
    elif kind == "pseudo-huber":
        loss = (r2 + c**2).sqrt() - c
    elif kind == "geman-mcclure":
        loss = r2 / (r2 + 4 * c**2)
    else:
        loss = r2
    return loss.mean(1) if reduction == "element" else loss


def early(indices: Int[Tensor, "batch"], levels: int, share: float = 0.25) -> Bool[Tensor, "batch"]:
    """Which pairs lie in the least noisy ``share`` of the grid and have a diffusion loss: j >= int((1 - share) N)."""
    return indices >= int((1 - share) * levels)


def diffusion_loss(
    guess: Float[Tensor, "batch *dims"],
    x: Float[Tensor, "batch *dims"],
    sigma: Float[Tensor, "batch"],
    chosen: Bool[Tensor, "batch"],
    sigma_data: float = 0.5,
) -> Float[Tensor, ""]:
    """Mean over the ``chosen`` samples of (1 / t^2 + 1 / sigma_data^2) mean((guess - x)^2); 0 where there are none."""
    each = (1 / sigma**2 + 1 / sigma_data**2) * (guess - x).flatten(1).square().mean(1)
    return torch.where(chosen, each, 0.0).sum() / chosen.sum().clamp(min=1)


def couple(x: Float[Tensor, "batch *dims"], noise: Float[Tensor, "batch *dims"]) -> Int[Tensor, "batch"]:
    """The order of ``x`` in which sum_b |x_b - noise_b|^2 is least: exact optimal transport within the batch.

    Only the sum of the products x . noise matters, so a factor on either changes nothing, nor does the mean of ``x``,
    which is taken off. Products are taken in the precision of what comes, float32 at least: they are most of the cost
    (latents of 4 x 32 x 32), not the assignment, which is O(batch^3) at worst, without scipy in numpy's own loop.

    Raises:
        BadInput: shapes that differ; numbers that are not finite.
    """
    if x.shape != noise.shape or not len(x):
        raise BadInput(f"each of the latents {list(x.shape)} has a noise of its shape, not {list(noise.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, noise.dtype), torch.float32)
    flat, free = x.flatten(1).to(dtype), noise.flatten(1).to(dtype)
    cost = -(free @ (flat - flat.mean(0)).T).double().cpu().numpy()
    if not np.isfinite(cost).all():
        raise BadInput("latents or noise that are not finite cannot be coupled: look for NaN in the data")
    return torch.from_numpy(assigned(cost)).to(x.device)


def assigned(cost: np.ndarray) -> np.ndarray:
    """The column of each row in the assignment of least total ``cost`` [n, n]."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return shortest_paths(cost)
    return linear_sum_assignment(cost)[1].astype(np.int64)


def shortest_paths(cost: np.ndarray) -> np.ndarray:
    """The same in numpy, by shortest augmenting paths with potentials (Jonker and Volgenant, 1987)."""
    n = len(cost)
    of_rows, of_columns = np.zeros(n), cost.min(0)
    row_of = np.full(n, -1)
    for row in range(n):
        best, before, seen = np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        current, at, far = row, -1, 0.0
        while True:
            there = far + cost[current] - of_rows[current] - of_columns
            shorter = ~seen & (there < best)
            best[shorter], before[shorter] = there[shorter], at
            at = int(np.where(seen, np.inf, best).argmin())
            far = best[at]
            if row_of[at] < 0:
                break
            seen[at] = True
            current = int(row_of[at])
        of_rows[row] += far
        of_rows[row_of[seen]] += far - best[seen]
        of_columns[seen] -= far - best[seen]
        while at >= 0:
            previous = before[at]
            row_of[at] = row if previous < 0 else row_of[previous]
            at = previous
    column = np.empty(n, np.int64)
    column[row_of] = np.arange(n)
    return column
