"""A number with everything that decides it, so that two numbers are compared only where that means something."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfumato.errors import BadInput

from .bootstrap import Estimate


@dataclass(frozen=True)
class Score:
    """What a metric's ``compute`` returns.

    Attributes:
        metric: the name, e.g. "fid".
        value: the number itself.
        low, high: its interval, 95 % by default (``interval`` says how it was made); NaN where it cannot be told.
        n_real, n_gen: how many pictures it was computed from; ``n_real`` is 0 where there is no real set.
        protocol: what else has to be equal for two numbers to be comparable, in the order of importance: extractor,
            weights, resize, pictures, dtype, convention, real, seed, version.
        spread: the standard deviation over subsets or splits, where the metric has any.
        interval: what was resampled and how, in words.
        better: the direction of improvement.
    """

    metric: str
    value: float
    low: float
    high: float
    n_real: int
    n_gen: int
    protocol: Mapping[str, Any] = field(default_factory=dict)
    spread: float | None = None
    interval: str = ""
    better: str = "lower"

    def fields(self) -> dict[str, Any]:
        """All that has to agree for a comparison, in the order in which differences are named."""
        return {"metric": self.metric, **self.protocol, "n_real": self.n_real, "n_gen": self.n_gen}

    def __sub__(self, other: Score) -> float:
        """The difference of two comparable values; see `compare`."""
        return compare(self, other)

    def __lt__(self, other: Score) -> bool:
        """Whether the value is lower; see `compare`."""
        return compare(self, other) < 0

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: what is not finite becomes a word."""
        numbers = {name: _worded(getattr(self, name)) for name in ("value", "low", "high", "spread")}
        rest = {"metric": self.metric, "n_real": self.n_real, "n_gen": self.n_gen, "protocol": dict(self.protocol)}
        return {**rest, **numbers, "interval": self.interval, "better": self.better}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Score:
        """The inverse of `to_json`.

        Raises:
            BadInput: not the record of a score.
        """
        try:
            numbers = {name: _number(values[name]) for name in ("value", "low", "high")}
            spread = None if values["spread"] is None else _number(values["spread"])
            return cls(**{**values, **numbers, "spread": spread})
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"this is not the record of a score: {error}") from error


def compare(first: Score, second: Score) -> float:
    """``first.value - second.value`` where both were measured in the same way.

    Raises:
        BadInput: they were not; the message names the first field that differs.
    """
    a, b = first.fields(), second.fields()
    for name in [*a, *(name for name in b if name not in a)]:
        if a.get(name) != b.get(name):
            raise BadInput(
                f"{first.metric} {first.value:.6g} and {second.metric} {second.value:.6g} cannot be compared: "
                f"{name} is {a.get(name)!r} in one and {b.get(name)!r} in the other"
            )
    return first.value - second.value


def scored(estimate: Estimate, over: str, level: float = 0.95) -> dict[str, Any]:
    """The part of a `Score` that an estimate tells; ``over`` says what was resampled."""
    how = {"none": "none", "constant": "none: all items are equal"}.get(
        estimate.method, f"{100 * level:g} %, {estimate.method}, over {over}"
    )
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "interval": how}


def _worded(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else str(number)


def _number(value: float | str) -> float:
    return float(value)
