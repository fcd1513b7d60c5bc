"""Intervals for means and rates by resampling (Efron and Tibshirani 1993), with the generator in your hands.

The items that are resampled are what chance varies: pictures of different prompts and seeds for a rate,
prompts (each the mean over its seeds) for a distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.special import ndtr, ndtri

from sfumato.errors import BadInput

RESAMPLES = 10_000
_AT_ONCE = 2_000_000  # indices held in memory at a time

Method = Literal["percentile", "bca"]
T95 = (
    12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216, 2.22814, 2.20099, 2.17881, 2.16037,
    2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302,
)  # fmt: skip
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean or rate with its interval ``[low, high]`` over ``n`` items; NaN where it cannot be told.

    ``method`` says how the interval was made: "percentile" or "bca" (bootstrap), "wilson" (rates of exactly 0
    or 1), "influence" (of a statistic of a set), "student" (few items), "constant" (all items equal), "none" (fewer
    than two items).
    """

    value: float
    low: float
    high: float
    n: int
    method: str


def mean_interval(
    values: Float[Tensor, "n"],
    generator: torch.Generator,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    method: Method = "bca",
) -> Estimate:
    """The mean of ``values`` and its bootstrap interval.

    Args:
        values: one number per item; finite.
        generator: the only source of randomness (a CPU generator).
        level: coverage aimed at, in (0, 1).
        resamples: bootstrap samples.
        method: "bca" corrects the percentiles for bias and skewness (Efron 1987), which matters for distances
            that pile up at 0; "percentile" takes them as they are.

    Raises:
        BadInput: values that are not one-dimensional or not finite, a level outside (0, 1).
    """
    x = _checked(values, level)
    n = len(x)
    if n < 2:
        return Estimate(float(x[0]) if n else math.nan, math.nan, math.nan, n, "none")
    mean = x.mean()
    if bool((x == x[0]).all()):
        return Estimate(float(x[0]), float(x[0]), float(x[0]), n, "constant")
    means = resampled_means(x, generator, resamples)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    if method == "bca":
        tails = bca_tails(x, means, tails)
    elif method != "percentile":
        raise BadInput(f'unknown interval {method!r}: use "bca" or "percentile"')
    low, high = torch.quantile(means, tails).tolist()
    return Estimate(float(mean), low, high, n, method)


def few_interval(
    values: Float[Tensor, "n"], generator: torch.Generator, *, least: float = -math.inf, most: float = math.inf
) -> Estimate:
    """The mean of a few values between ``least`` and ``most``, and its 95 % interval by Student's t.

    For what there are a handful of: concepts, seeds, runs. A bootstrap has no resample beyond the smallest and the
    largest of them, and covers the mean far less often than it says. From 21 values on this is the BCa bootstrap of
    `mean_interval`, for which the ``generator`` is.

    Raises:
        BadInput: as `mean_interval`.
    """
    x = _checked(values, 0.95)
    n = len(x)
    if not 2 <= n <= len(T95) + 1 or bool((x == x[0]).all()):
        return mean_interval(x, generator)
    mean, reach = float(x.mean()), T95[n - 2] * float(x.std()) / math.sqrt(n)
    return Estimate(mean, max(least, mean - reach), min(most, mean + reach), n, "student")


def rate_interval(
    hits: Bool[Tensor, "n"], generator: torch.Generator, *, level: float = 0.95, resamples: int = RESAMPLES
) -> Estimate:
    """The share of ``hits`` and its percentile bootstrap interval.

    At a share of exactly 0 or 1 it is Wilson's, as of `share_interval`.
    """
    if hits.dtype != torch.bool:
        raise BadInput(f"a rate is taken over True and False, not over {hits.dtype}")
    return share_interval(hits.double(), generator, level=level, resamples=resamples)


def share_interval(
    values: Float[Tensor, "n"],
    generator: torch.Generator,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    method: Method = "percentile",
) -> Estimate:
    """The mean of shares in [0, 1], and its interval as of `mean_interval`.

    Where all of them are 0, or all are 1, every resample is the same and the bootstrap would claim certainty; there the
    interval is Wilson's score interval (`wilson`), and ``method`` says so. It is that of shares which are 0 or 1, the
    widest there can be.
    """
    n = len(values)
    if n and bool((values == values[0]).all()) and float(values[0]) in (0.0, 1.0):
        share = int(values[0])
        return Estimate(float(share), *wilson(share * n, n, level), n, "wilson")
    return mean_interval(values, generator, level=level, resamples=resamples, method=method)


def paired_difference(
    first: Float[Tensor, "n"],
    second: Float[Tensor, "n"],
    generator: torch.Generator,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    method: Method = "bca",
) -> Estimate:
    """Mean of ``second - first``, item by item, with its bootstrap interval over items.

    Both were measured on the same items (prompts and seeds), so what is common to both cancels.

    Raises:
        BadInput: sets of different length.
    """
    if first.shape != second.shape:
        raise BadInput(f"paired sets have one length, not {len(first)} and {len(second)}")
    difference = second.double() - first.double()
    return mean_interval(difference, generator, level=level, resamples=resamples, method=method)


def influence_interval(
    value: float,
    influence: Float[Tensor, "n"],
    generator: torch.Generator,
    *,
    noise: float = 0.0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The interval of a statistic from the influence of each item on it: the bootstrap of its linear part.

    Drawing whole items with replacement would be wrong for statistics of sets: copies lower the rank of a covariance
    and count as neighbours at distance 0, so resampled distances lie far above the statistic and scatter too widely.
    To first order a statistic of other items is ``value`` plus the mean of their influences (the infinitesimal
    jackknife, Efron 1982), and a mean can be resampled. Where the first order vanishes (equal distributions) the
    interval is too wide rather than too narrow.

    Args:
        value: the statistic of these items.
        influence: n times its derivative by the weight of each item, of mean 0.
        noise: standard error of the statistic for these very items, where it depends on random numbers of its own; the
            interval is widened by it in quadrature.

    Raises:
        BadInput: as `mean_interval`.
    """
    around = mean_interval(influence, generator, level=level, resamples=resamples)
    if around.method == "none":
        return Estimate(value, math.nan, math.nan, around.n, "none")
    error = float(influence.double().std()) / math.sqrt(around.n)
    if error:
        low, high = (math.hypot(1, noise / error) * (end - around.value) for end in (around.low, around.high))
    else:
        high = noise * float(ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
        low = -high
    return Estimate(value, value + low, value + high, around.n, "influence")


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927): the rates p with |successes/n - p| <= z
    sqrt(p(1-p)/n)."""
    z = float(ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    p, w = successes / n, z * z / n
    centre, half = p + w / 2, math.sqrt(w * (p * (1 - p) + w / 4))
    # Exactly 0 and 1 at the ends, which rounding would miss.
    low = 0.0 if successes == 0 else (centre - half) / (1 + w)
    return low, 1.0 if successes == n else (centre + half) / (1 + w)


def resampled_means(x: Float[Tensor, "n"], generator: torch.Generator, resamples: int) -> Float[Tensor, "resamples"]:
    """Means of ``resamples`` samples of n items drawn from ``x`` with replacement."""
    n, rows = len(x), max(1, _AT_ONCE // len(x))
    parts = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        parts.append(x[torch.randint(n, (count, n), generator=generator)].mean(dim=1))
    return torch.cat(parts)


def bca_tails(
    x: Float[Tensor, "n"], means: Float[Tensor, "resamples"], tails: Float[Tensor, "tails"]
) -> Float[Tensor, "tails"]:
    """The percentiles of ``means`` that bound the BCa interval instead of ``tails`` (Efron 1987, eq. 2.3).

    The bias correction counts ties as half; the acceleration of a mean is the jackknife's
    sum d^3 / (6 (sum d^2)^1.5) with d the deviations from the mean.
    """
    d = x - x.mean()
    acceleration = d.pow(3).sum() / (6 * d.square().sum().pow(1.5))
    below = (means < x.mean()).double().mean() + (means == x.mean()).double().mean() / 2
    margin = 0.5 / len(means)
    bias = ndtri(below.clamp(margin, 1 - margin))
    shifted = bias + ndtri(tails)
    return ndtr(bias + shifted / (1 - acceleration * shifted))


def _checked(values: Tensor, level: float) -> Float[Tensor, "n"]:
    if not 0 < level < 1:
        raise BadInput(f"the level of an interval lies between 0 and 1, not {level}")
    if values.ndim != 1 or not bool(torch.isfinite(values).all()):
        raise BadInput("an interval is made of one finite number per item")
    return values.detach().to("cpu", torch.float64)
