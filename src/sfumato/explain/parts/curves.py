"""Errors over strengths as one number, with its interval over retraining seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from sfumato.metrics.bootstrap import Estimate, few_interval


def cumulative(wrong: Sequence[float], strengths: Sequence[float], how: Literal["sum", "area"]) -> float:
    """The sum of the errors at all strengths; or the area under them (trapezoids), divided by the length of the grid.

    A grid of one strength has no length: its area is the error there.
    """
    if how == "sum":
        return float(sum(wrong))
    length = strengths[-1] - strengths[0]
    if length == 0:
        return float(wrong[0])
    points = list(zip(strengths, wrong, strict=True))
    return sum((b - a) * (u + v) / 2 for (a, u), (b, v) in pairwise(points)) / length


def score_of(
    runs: Sequence[Sequence[int]], strengths: Sequence[float], n: int, how: Literal["sum", "area"], seed: int
) -> dict[str, Any]:
    """The mean score of all runs, with its interval over them: errors of "sum" are counted, of "area" shares of n."""
    scale = 1 if how == "sum" else n
    scores = [cumulative([x / scale for x in run], strengths, how) for run in runs]
    return {**interval(scores, seed), "runs": scores}


def curve(counts: Sequence[int], n: int, seed: int) -> dict[str, Any] | None:
    """The share of errors at one strength, with its interval over runs; None without runs."""
    return interval([x / n for x in counts], seed) if counts else None


def interval(values: Sequence[float], seed: int) -> dict[str, Any]:
    """The mean over runs and its 95 % interval, in JSON's types."""
    rng = torch.Generator().manual_seed(seed)
    found: Estimate = few_interval(torch.tensor(values, dtype=torch.float64), rng, least=0.0)
    low, high = (None if math.isnan(x) else x for x in (found.low, found.high))
    return {"value": found.value, "low": low, "high": high, "n": found.n}


def kept_first(metric: str) -> bool:
    """Whether few errors speak for an attribution: where only what it points at is kept."""
    return metric == "kar"
