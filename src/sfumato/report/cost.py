"""The page of quality against cost: one point for each way to draw, its intervals, and the table behind it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sfumato.report.images import Embedded, Picture, embed
from sfumato.report.page import environment
from sfumato.report.schema import Interval
from sfumato.report.words import full, number
from sfumato.text import shown

TOP, BOTTOM = 12, 252
"""Pixels: where a plot begins and ends; across, places are in per cent of the width."""
SIDE = 256
"""Pixels: largest side of a picture on the page."""


@dataclass(frozen=True)
class Point:
    """One way to draw.

    Attributes:
        group, label: the line of the plot, and which of its points.
        nfe: network evaluations for a picture; guidance counts twice.
        seconds: for a picture.
        accuracy: share of what was asked for that is there; None where nobody can tell.
        distance: Fréchet distance to real pictures.
        pictures: the first ones, for the page only.
    """

    group: str
    label: str
    nfe: float
    seconds: float
    accuracy: Interval | None
    distance: Interval
    pictures: Sequence[Picture] = ()

    def to_json(self) -> dict[str, Any]:
        plain = {k: getattr(self, k) for k in ("group", "label", "nfe", "seconds")}
        return {**plain, "accuracy": self.accuracy and self.accuracy.to_json("mean"),
                "distance": self.distance.to_json("value")}  # fmt: skip


@dataclass(frozen=True)
class CostReport:
    """All points and how they were measured."""

    points: Sequence[Point]
    protocol: Mapping[str, Any]
    created: str = ""
    sfumato: str = ""
    reproduce: str = ""
    """The command line that repeats the measurement."""

    def to_json(self) -> dict[str, Any]:
        rest = {k: getattr(self, k) for k in ("created", "sfumato", "reproduce")}
        return {"points": [p.to_json() for p in self.points], "protocol": dict(self.protocol), **rest}

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write ``cost.json`` and the self-contained ``index.html``, both or neither."""
        from sfumato.files import atomic_folder, write_json

        with atomic_folder(folder, overwrite=overwrite) as temporary:
            write_json(temporary / "cost.json", self.to_json())
            (temporary / "index.html").write_text(render(self), encoding="utf-8")
        return Path(folder)


@dataclass(frozen=True)
class Dot:
    """A point on a plot: across in per cent, down in pixels, with the ends of its interval."""

    x: float
    y: float
    high: float
    low: float
    text: str


@dataclass(frozen=True)
class Plot:
    """One plot: the dots of each group (its place decides its colour), and the ticks (place, text) of both axes."""

    title: str
    across: str
    groups: Mapping[str, Sequence[Dot]]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    curves: Collection[str] = ()
    """Groups whose dots are joined."""

    def lines(self, group: str) -> Iterator[tuple[Dot, Dot]]:
        """Neighbouring dots of a group that are joined."""
        return pairwise(self.groups[group]) if group in self.curves else iter(())


def curves(points: Sequence[Point]) -> set[str]:
    """Groups in which nothing but the number of steps differs: not students, nor the settings of a patch."""
    return {p.group for p in points} - {p.group for p in points if not re.fullmatch(r"\d+ steps?", p.label)}


def render(report: CostReport) -> str:
    """The page as text."""
    report = shown(report)
    groups = list(dict.fromkeys(p.group for p in report.points))
    rows: dict[str, list[tuple[Point, list[Embedded]]]] = {}
    for p in report.points:
        if p.pictures:
            rows.setdefault(p.group, []).append((p, [embed(picture, SIDE) for picture in p.pictures]))
    page = environment().get_template("cost.html.j2")
    return page.render(report=report, plots=plots(report), groups=groups, rows=rows)


def plots(report: CostReport) -> list[Plot]:
    """Accuracy (where it was measured) and distance, each against network evaluations and against seconds."""
    costs = (("network evaluations for a picture", lambda p: p.nfe), ("seconds for a picture", lambda p: p.seconds))
    figures = [("Fréchet distance (lower is better)", lambda p: p.distance, False)]
    if all(p.accuracy is not None and p.accuracy.value is not None for p in report.points):
        figures.insert(0, ("What was asked for and is there (higher is better)", lambda p: p.accuracy, True))
    return [_plot(report.points, title, figure, rate, *cost) for title, figure, rate in figures for cost in costs]


def _plot(
    points: Sequence[Point], title: str, figure: Callable, rate: bool, across: str, cost: Callable
) -> Plot:
    x_low, x_high, x_ticks = _log_axis([cost(p) for p in points])
    values = [v for p in points for v in (figure(p).value, figure(p).low, figure(p).high) if v is not None]
    if rate:
        low, high = min(0.9, math.floor(10 * min(values)) / 10), 1.0
        y_ticks = [(low + (high - low) * i / 4, f"{100 * (low + (high - low) * i / 4):.3g} %") for i in range(5)]
        scale = lambda v: (v - low) / (high - low)
    else:
        # Distances differ by powers of ten, and one of equal sets may come out as nothing.
        least = max(min((v for v in values if v > 0), default=1e-3), max(values) / 1e4)
        low, high, y_ticks = _log_axis([max(v, least) for v in values])
        scale = lambda v: math.log(max(v, low) / low) / math.log(high / low)
    x = lambda v: 10 + 90 * math.log(v / x_low) / math.log(x_high / x_low)  # the ticks of the other axis stand before
    y = lambda v: BOTTOM - (BOTTOM - TOP) * scale(v)
    groups: dict[str, list[Dot]] = {}
    for p in sorted(points, key=cost):
        i = figure(p)
        top, bottom = (y(i.value if end is None else end) for end in (i.high, i.low))
        text = f"{p.group}, {p.label}: {full(i, rate)}; {across} {number(cost(p))}"
        groups.setdefault(p.group, []).append(Dot(x(cost(p)), y(i.value), top, bottom, text))
    ticks = [(x(v), t) for v, t in x_ticks], [(y(v), t) for v, t in y_ticks]
    return Plot(title, across, groups, *ticks, curves(points))


def _log_axis(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    """Ends of a logarithmic axis around positive values with some room, ticks at 1, 2 and 5 times powers of ten.

    A short axis has fewer than three of these: then at the multiples of the finest such number that fits into it at
    most six times.
    """
    low, high = min(values) / 1.15, max(values) * 1.15
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    if len(ticks) < 3:
        finest = math.floor(math.log10(high - low)) - 1
        step = next(s for k in (0, 1, 2) for m in (1, 2, 5) if (high - low) / (s := m * 10.0 ** (finest + k)) <= 6)
        ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, [(v, f"{v:.6g}") for v in ticks]
