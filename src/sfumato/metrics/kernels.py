"""Distances of two sets of features by kernels: KID (unbiased, polynomial) and CMMD (biased, Gaussian).

Both are squared maximum mean discrepancies, MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y). Neither assumes that
features are Gaussian. Each comes with the influence of every generated picture, as `frechet.frechet_influence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .moments import check_features

_AT_ONCE = 8_000_000  # kernel values held in memory at a time


@dataclass(frozen=True)
class Discrepancy:
    """An MMD^2, its standard deviation over subsets (0 where there are none) and what each picture contributes.

    ``influence`` has mean 0 and one entry for every generated picture that took part; ``noise`` is the standard error
    that comes from the choice of subsets.
    """

    value: float
    spread: float
    influence: Float[Tensor, "n"]
    noise: float = 0.0


def kid(
    real: Float[Tensor, "n d"],
    generated: Float[Tensor, "m d"],
    rng: torch.Generator,
    *,
    subsets: int = 100,
    size: int = 1000,
) -> Discrepancy:
    """Kernel Inception distance: the unbiased MMD^2 with k(x, y) = (x.y / d + 1)^3 (1801.01401, sec. 3).

        [sum_{i!=j} k(x_i, x_j) + sum_{i!=j} k(y_i, y_j)] / (s (s - 1)) - 2 / s^2 sum_{ij} k(x_i, y_j)

    averaged over ``subsets`` pairs of subsets of ``size`` pictures drawn without replacement (fewer where a set is
    smaller; where it is all of both sets, there is one subset). May be negative. Not multiplied by anything. The
    influences leave out that other subsets would have been drawn, which is ``noise``.

    Raises:
        BadInput: fewer than two pictures in a set or a subset, no subsets, or features that do not fit.
    """
    _check(real, generated, 2)
    if size < 2 or subsets < 1:
        raise BadInput(f"KID is the mean of at least 1 subset of at least 2 pictures, not of {subsets} of {size}")
    size = min(size, len(real), len(generated))
    if size == len(real) == len(generated):
        subsets = 1
    x, y = real.to(torch.float64), generated.to(torch.float64)
    values = []
    total, times = (torch.zeros(len(y), dtype=torch.float64, device=y.device) for _ in range(2))
    for _ in range(subsets):
        rows, columns = (torch.randperm(len(s), generator=rng)[:size].to(s.device) for s in (x, y))
        value, influence = _polynomial(x[rows], y[columns])
        values.append(value)
        total[columns] += influence
        times[columns] += 1
    found = torch.tensor(values, dtype=torch.float64)
    seen = times > 0
    own = total[seen] / times[seen]
    spread = float(found.std(correction=0))
    return Discrepancy(float(found.mean()), spread, own - own.mean(), spread / subsets**0.5)


def cmmd(
    real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], *, sigma: float = 10.0, scale: float = 1000.0
) -> Discrepancy:
    """``scale`` times the biased MMD^2 with k = exp(-|x - y|^2 / (2 sigma^2)) (Jayasumana et al. 2024, 2401.09603).

    A V-statistic: never negative but for round-off, 0 for equal sets. The kernels are summed as k - 1, a constant
    that cancels, because at sigma = 10 all of them lie close to 1 for features of unit length.

    Args:
        real, generated: CLIP image embeddings of unit length for the published numbers.
        sigma: width of the kernel.

    Raises:
        BadInput: an empty set, features that do not fit, a sigma that is not positive and finite.
    """
    _check(real, generated, 1)
    if not 0 < sigma < math.inf:
        raise BadInput(f"the width of a kernel is positive and finite, not {sigma}")
    x, y = real.to(torch.float64), generated.to(torch.float64)
    xx, yy, yx = (_row_means(a, b, sigma) for a, b in ((x, x), (y, y), (y, x)))
    influence = 2 * scale * (yy - yx)
    value = scale * float(xx.mean() + yy.mean() - 2 * yx.mean())
    return Discrepancy(value, 0.0, influence - influence.mean())


def _polynomial(x: Float[Tensor, "s d"], y: Float[Tensor, "s d"]) -> tuple[float, Float[Tensor, "s"]]:
    """The unbiased MMD^2 of two subsets of one size and the influences of the second."""
    s, d = x.shape
    xx, yy, yx = ((a @ b.mT / d + 1) ** 3 for a, b in ((x, x), (y, y), (y, x)))
    xx.fill_diagonal_(0)
    yy.fill_diagonal_(0)
    own = 2 * (yy.sum(1) / (s - 1) - yx.mean(1))
    return float((xx.sum() + yy.sum()) / (s * (s - 1)) - 2 * yx.mean()), own - own.mean()


def _row_means(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], sigma: float) -> Float[Tensor, "n"]:
    """mean_j [k(a_i, b_j) - 1], a block at a time."""
    step = max(1, int(_AT_ONCE**0.5))
    norms = b.square().sum(1)
    parts = []
    for rows in a.split(step):
        total = torch.zeros(len(rows), dtype=a.dtype, device=a.device)
        for start in range(0, len(b), step):
            columns = slice(start, start + step)
            squares = rows.square().sum(1)[:, None] + norms[columns] - 2 * (rows @ b[columns].mT)
            total += torch.expm1(squares.clamp(min=0) / (-2 * sigma**2)).sum(1)
        parts.append(total / len(b))
    return torch.cat(parts)


def _check(real: Tensor, generated: Tensor, least: int) -> None:
    check_features(real)
    check_features(generated, real.shape[1])
    if min(len(real), len(generated)) < least:
        raise BadInput(f"a kernel distance needs {least} pictures in each set, not {len(real)} and {len(generated)}")
