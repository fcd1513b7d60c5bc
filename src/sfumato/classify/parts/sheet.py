"""What there is to see of a trained classifier: pictures in rows, with what is told of them, and small plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """A row of a sheet.

    Attributes:
        name: what the row is of.
        pictures: each with its caption; values in [-1, 1], clipped where they are beyond.
        told: what is to be said of it (JSON types).
    """

    name: str
    pictures: Sequence[tuple[str, Float[Tensor, "3 h w"]]]
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A small plot: lines of (x, y) by their names."""

    title: str
    across: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Sheet:
    """A section of the classifier's page.

    Attributes:
        about: what is shown, in a sentence or two.
        told: what is to be said of all of it (JSON types).
    """

    title: str
    about: str
    rows: Sequence[Row] = ()
    figures: Sequence[Figure] = ()
    told: Mapping[str, Any] = field(default_factory=dict)
