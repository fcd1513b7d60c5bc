"""The Fréchet distance of two sets of features, its bias-free limit, and what each picture contributes to it.

    FD = |m_x - m_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)

(FID when the features are those of the 2015 Inception network: Heusel et al. 2017, arXiv:1706.08500, eq. 6.) The
last trace is the sum of the singular values of R_x R_y^T for any roots with S = R^T R, so no square root of a
non-symmetric product is taken: its error is sqrt(eps) where a set has fewer pictures than dimensions, and it may come
out complex. Round-off may leave a distance of equal sets slightly below 0; it is not clamped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .moments import Moments, moments

SIZES = 15
"""Sample sizes over which FD is extrapolated."""
_SOUND = 1e-6
"""Smallest ratio of pivots at which a Cholesky factor is relied on (a condition number of about 1e12)."""
_PANELS = 8


class Gaussian:
    """A set of features as the distance sees it; what is expensive is computed once and kept.

    Args:
        features: (n, d), or None where only moments are known; then sets with n <= d lose half of the digits of the
            trace, as their covariance has to be taken apart again.
        known: the moments, where they have been computed already.
    """

    def __init__(self, features: Float[Tensor, "n d"] | None = None, known: Moments | None = None):
        if features is None and known is None:
            raise BadInput("a Gaussian is made of features or of moments")
        self.features = features
        self.moments = known if known is not None else moments(features)

    @property
    def n(self) -> int:
        return self.moments.n

    @property
    def d(self) -> int:
        return len(self.moments.mean)

    def rows(self) -> Float[Tensor, "n d"]:
        """Centred features over sqrt(n - 1), float64: a root of the covariance."""
        if self.features is None:
            raise BadInput("only mean and covariance of this set are known, and this needs its features")
        return (self.features.to(torch.float64) - self.moments.mean) / math.sqrt(self.n - 1)

    @cached_property
    def triangle(self) -> Float[Tensor, "d d"] | None:
        """The lower Cholesky factor of the covariance; None where it is singular or nearly so."""
        if self.n <= self.d:
            return None
        factor, failed = torch.linalg.cholesky_ex(self.moments.cov)
        pivots = factor.diagonal()
        sound = not bool(failed) and bool(pivots.min() > _SOUND * pivots.max())
        return factor if sound else None

    @cached_property
    def root(self) -> Float[Tensor, "r d"]:
        """R with S = R^T R, without ever squaring the features where that would lose digits."""
        if self.features is not None and self.n <= self.d:
            return self.rows()
        if self.triangle is not None:
            return self.triangle.mT
        if self.features is not None:
            return torch.linalg.qr(self.rows(), mode="r").R
        values, vectors = torch.linalg.eigh(self.moments.cov)
        kept = values > self.d * torch.finfo(values.dtype).eps * values[-1]
        return values[kept].sqrt()[:, None] * vectors[:, kept].mT


Set = Gaussian | Moments | Float[Tensor, "n d"]


def frechet_distance(real: Set, generated: Set) -> float:
    """FD of two sets, each given by its features, its moments or a `Gaussian` (which keeps what it has computed).

    Cost: a covariance and a Cholesky factor for each set and the eigenvalues of one symmetric (d, d) matrix; the
    singular values of one (n, d) matrix where a covariance is singular.

    Raises:
        BadInput: fewer than two pictures, features that are not finite or of different widths.
    """
    x, y = as_gaussian(real), as_gaussian(generated)
    _check(x, y)
    return _outside(x, y) - 2 * float(trace_of_root(x, y))


def trace_of_root(x: Gaussian, y: Gaussian) -> Float[Tensor, ""]:
    """tr (S_x S_y)^(1/2)."""
    if x.triangle is not None and y.triangle is not None:
        # the eigenvalues of L^T S_y L are those of S_x S_y; below 0 they are round-off
        return torch.linalg.eigvalsh(_congruence(x.triangle, y.moments.cov)).clamp(min=0).sqrt().sum()
    return torch.linalg.svdvals(x.root @ y.root.mT).sum()


def frechet_influence(real: Set, generated: Set) -> tuple[float, Float[Tensor, "n"]]:
    """FD and the influence of each generated picture on it, float64, of mean 0.

    With weights w_j on the generated pictures (all 1 for the sample as it is) the influence is n dFD/dw_j: to first
    order FD moves by the mean of the influences of the pictures drawn. With P = R_x Y^T / sqrt(n - 1), Y the centred
    features, the trace term is the nuclear norm of P, whose derivative by w_j is |P|_jj / 2, |P| = (P^T P)^(1/2).
    Holds for n below d too. Resampling with replacement does not: it repeats pictures, which lowers the rank.
    """
    x, y = as_gaussian(real), as_gaussian(generated)
    _check(x, y)
    rows, n = y.rows(), y.n
    if x.triangle is not None and y.triangle is not None:
        values, vectors = torch.linalg.eigh(_congruence(x.triangle, y.moments.cov))
        roots = values.clamp(min=values[-1] * torch.finfo(values.dtype).eps).sqrt()
        own = (rows @ ((x.triangle @ vectors) / roots.sqrt())).square().sum(1)
        trace = values.clamp(min=0).sqrt().sum()
    else:
        _, values, vectors = torch.linalg.svd(x.root @ rows.mT, full_matrices=False)
        own = values @ vectors.square()
        trace = values.sum()
    shift = y.moments.mean - x.moments.mean
    influence = 2 * math.sqrt(n - 1) * (rows @ shift) + n * (rows.square().sum(1) - own)
    return _outside(x, y) - 2 * float(trace), influence - influence.mean()


@dataclass(frozen=True)
class Extrapolation:
    """FD at several numbers of generated pictures and the line through them: FD = value + slope / n."""

    value: float
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]
    influence: Float[Tensor, "n"]


def frechet_infinity(
    real: Set,
    generated: Float[Tensor, "n d"],
    rng: torch.Generator,
    *,
    smallest: int | None = None,
    draws: int = 1,
) -> Extrapolation:
    """FD without the bias of finite samples: the limit of FD(n) as n grows (Chong and Forsyth 2020, 1911.07023).

    FD of n pictures lies above its limit by about c / n, where c depends on the model. FD is taken at `SIZES` sizes,
    evenly spaced from ``smallest`` to all, each of pictures drawn without replacement, and the least-squares line in
    1 / n is read off at 0. The real set is kept as it is.

    Args:
        smallest: the smallest size; by default 5000, or a tenth of the pictures where there are fewer than 50,000.
            The law holds where it exceeds the number of features.
        draws: sets drawn for each size.

    Raises:
        BadInput: too few generated pictures for sizes that differ, or no draws.
    """
    n = len(generated)
    if draws < 1:
        raise BadInput(f"FD at infinity draws at least 1 set of each size, not {draws}")
    smallest = min(5000, max(n // 10, 2)) if smallest is None else smallest
    if not 2 <= smallest <= n - SIZES + 1:
        raise BadInput(
            f"FD at infinity needs {SIZES} sizes from {smallest} pictures on, and {n} were generated: generate more"
        )
    x = as_gaussian(real)
    sizes = [int(s) for s in torch.linspace(smallest, n, SIZES, dtype=torch.float64)]
    sizes = [size for size in sizes for _ in range(draws)]
    weights = intercept_weights(sizes)
    distances, influence = [], torch.zeros(n, dtype=torch.float64, device=generated.device)
    for size, weight in zip(sizes, weights.tolist(), strict=True):
        chosen = torch.randperm(n, generator=rng)[:size].to(generated.device)
        distance, own = frechet_influence(x, generated[chosen])
        distances.append(distance)
        influence[chosen] += weight * n / size * own
    at = torch.tensor(distances, dtype=torch.float64)
    value = float(weights @ at)
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    slope = float((inverse - inverse.mean()) @ at / (inverse - inverse.mean()).square().sum())
    return Extrapolation(value, slope, tuple(sizes), tuple(distances), influence)


def intercept_weights(sizes: Sequence[int]) -> Float[Tensor, "sizes"]:
    """Weights w with sum_k w_k FD_k the intercept of the least-squares line of FD in 1 / n."""
    x = 1 / torch.tensor(sizes, dtype=torch.float64)
    spread = x - x.mean()
    return 1 / len(x) - x.mean() * spread / spread.square().sum()


def as_gaussian(given: Set) -> Gaussian:
    """The set, with what it knows."""
    if isinstance(given, Gaussian):
        return given
    return Gaussian(known=given) if isinstance(given, Moments) else Gaussian(given)


def _outside(x: Gaussian, y: Gaussian) -> float:
    """All of the distance but the trace of the root."""
    apart = (x.moments.mean - y.moments.mean).square().sum()
    return float(apart + x.moments.cov.trace() + y.moments.cov.trace())


def _congruence(lower: Float[Tensor, "d d"], s: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The lower triangle of L^T S L, panel by panel: a third of the work of two plain products."""
    d = len(s)
    step = max(64, -(-d // _PANELS))
    right, result = torch.empty_like(s), torch.zeros_like(s)
    for j in range(0, d, step):
        right[:, j : j + step] = s[:, j:] @ lower[j:, j : j + step]
    for i in range(0, d, step):
        result[i : i + step, : i + step] = lower[i:, i : i + step].mT @ right[i:, : i + step]
    return result


def _check(x: Gaussian, y: Gaussian) -> None:
    if x.d != y.d:
        raise BadInput(f"features of {x.d} numbers and of {y.d} have no distance: use one extractor for both sets")
