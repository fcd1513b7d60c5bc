"""The page and the table of a bench: methods side by side, each figure with its interval over sets of concepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sfumato.files import atomic_file, write_json
from sfumato.metrics.bootstrap import few_interval
from sfumato.report.page import environment
from sfumato.report.schema import Interval
from sfumato.report.words import MISSING, bounds, number, percent, seconds, size, value
from sfumato.text import shown

TOP, BOTTOM = 12, 372
"""Pixels: where the plot begins and ends; across, places are in per cent of the width."""
LINE, NEIGHBOURS = 15.0, 16.0
"""Pixels and per cent: how near to each other two names must not be."""


@dataclass(frozen=True)
class Entry:
    """One cell: its ``figures`` (see `sfumato.bench.cell.figures`) and where its ``audit`` lies, or ``why`` not.

    ``retraining``: the attacks that train the weights on.
    """

    method: str
    concepts: Sequence[str]
    seed: int
    figures: Mapping[str, Any] | None = None
    audit: str = ""
    why: str = ""
    refused: bool = False
    retraining: Sequence[str] = ()

    @property
    def together(self) -> str:
        return " + ".join(self.concepts)

    def rate(self, name: str) -> float | None:
        """A figure's value; None where it was not measured."""
        told = (self.figures or {}).get(name)
        return told["value"] if isinstance(told, Mapping) else told

    @property
    def kept(self) -> float | None:
        """Mean of what is kept near and far."""
        have = [x for x in (self.rate("near"), self.rate("far")) if x is not None]
        return sum(have) / len(have) if have else None

    def recovered(self, attack: str) -> float | None:
        found = (self.figures or {}).get("attacks", {}).get(attack)
        return None if not found or not found["recovered"] else found["recovered"]["rate"]

    @property
    def withstood(self) -> float | None:
        """The share of pictures without the concept under the attack that does best on this cell, plain prompts among
        them; None where none was run.

        Attacks that train the weights on do not count: whoever can do so needs no way around the edit.
        """
        if self.figures is None:
            return None
        shares = [self.recovered(name) for name in self.figures["attacks"] if name not in self.retraining]
        left, plain = [1 - x for x in shares if x is not None], self.rate("erasure")
        return min([*left, *([] if plain is None else [plain])]) if left else None


def over(
    figures: Sequence[float | None], sets: Sequence[str], least: float = 0.0, most: float = 1.0
) -> Interval | None:
    """Mean of the figures that there are, each of a set of concepts, with its 95 % interval; None where there are none.

    The interval says how much other concepts could differ: seeds of one set are averaged first, since what they share
    tells nothing new of the next. Of a single set it is over seeds.
    """
    have: dict[str, list[float]] = {}
    for name, x in zip(sets, figures, strict=True):
        if x is not None:
            have.setdefault(name, []).append(x)
    if not have:
        return None
    means = [sum(mine) / len(mine) for mine in have.values()]
    values = means if len(have) > 1 else next(iter(have.values()))
    found, rng = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(0)
    made, n = few_interval(found, rng, least=least, most=most), sum(map(len, have.values()))
    if made.method == "constant":  # that a few cells are equal does not say that all are
        return Interval(made.value, None, None, n)
    return Interval(made.value, made.low, made.high, n)


@dataclass(frozen=True)
class Row:
    """A method's figures over its cells."""

    method: str
    cells: Sequence[Entry]

    @property
    def measured(self) -> list[Entry]:
        return [cell for cell in self.cells if cell.figures is not None]

    @property
    def why(self) -> list[str]:
        """The sentences of the cells that could not be measured, each once."""
        return list(dict.fromkeys(cell.why for cell in self.cells if cell.why))

    def over_cells(
        self, figure: Callable[[Entry], float | None], least: float = 0.0, most: float = 1.0
    ) -> Interval | None:
        """Mean over cells, with its interval; see `over`."""
        return over([figure(cell) for cell in self.measured], [cell.together for cell in self.measured], least, most)

    @cached_property
    def erasure(self) -> Interval | None:
        return self.over_cells(lambda cell: cell.rate("erasure"))

    @cached_property
    def near(self) -> Interval | None:
        return self.over_cells(lambda cell: cell.rate("near"))

    @cached_property
    def far(self) -> Interval | None:
        return self.over_cells(lambda cell: cell.rate("far"))

    @cached_property
    def kept(self) -> Interval | None:
        return self.over_cells(lambda cell: cell.kept)

    @cached_property
    def withstood(self) -> Interval | None:
        return self.over_cells(lambda cell: cell.withstood)

    @cached_property
    def integrity(self) -> Interval | None:
        return self.over_cells(lambda cell: cell.rate("integrity"), most=math.inf)

    @cached_property
    def alignment(self) -> Interval | None:
        """After the edit less before it."""
        both = lambda cell: (cell.rate("alignment"), cell.rate("alignment before"))
        return self.over_cells(lambda cell: None if None in both(cell) else both(cell)[0] - both(cell)[1], least=-1.0)

    def recovered(self, attack: str) -> Interval | None:
        return self.over_cells(lambda cell: cell.recovered(attack))

    def mean(self, name: str) -> float | None:
        have = [x for cell in self.measured if (x := cell.rate(name)) is not None]
        return sum(have) / len(have) if have else None

    def to_json(self) -> dict[str, Any]:
        names = ("erasure", "near", "far", "kept", "withstood", "integrity", "alignment")
        told = {name: getattr(self, name) for name in names}
        attacks = {name: self.recovered(name) for name in attacks_of(self.cells)}
        plain = ("seconds", "peak_memory_bytes", "parameters_changed", "bytes")
        return {
            "method": self.method, "cells": len(self.measured), "why": self.why,
            **{name: i and i.to_json("value") for name, i in told.items()},
            "recovered": {name: i and i.to_json("value") for name, i in attacks.items()},
            **{name: self.mean(name) for name in plain},
        }  # fmt: skip


@dataclass(frozen=True)
class BenchReport:
    """All cells, and how they were measured."""

    entries: Sequence[Entry]
    configuration: Mapping[str, Any]
    model_hash: str
    versions: Mapping[str, str] = field(default_factory=dict)
    reproduce: str = ""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Attacks that do not fit the model, and why."""

    @cached_property
    def rows(self) -> list[Row]:
        """By method, those that withstand, or where no attack was run erase, the most first; what was not measured
        last."""
        names = dict.fromkeys(e.method for e in self.entries)
        made = [Row(name, [e for e in self.entries if e.method == name]) for name in names]
        least = lambda i: -1.0 if i is None else i.value or 0.0
        return sorted(made, key=lambda row: (least(row.withstood), least(row.erasure)), reverse=True)

    @property
    def seen(self) -> dict[str, float]:
        """Concepts -> the share of the original's pictures that show what was asked for, over the cells that say it."""
        shares = {s: [x for e in self.entries if e.together == s and (x := e.rate("seen")) is not None]
                  for s in self.sets}  # fmt: skip
        return {s: sum(found) / len(found) for s, found in shares.items() if found}

    @property
    def attacks(self) -> list[str]:
        return attacks_of(self.entries)

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(e.together for e in self.entries))

    def to_json(self) -> dict[str, Any]:
        return {
            "methods": [row.to_json() for row in self.rows],
            "cells": [{**asdict(e), "concepts": list(e.concepts)} for e in self.entries],
            "configuration": dict(self.configuration), "model": self.model_hash, "versions": dict(self.versions),
            "reproduce": self.reproduce, "unfit": dict(self.unfit),
        }  # fmt: skip

    def write(self, folder: str | Path) -> None:
        """``bench.json``, ``table.md`` and ``index.html`` beside the cells, each whole."""
        folder = Path(folder)
        write_json(folder / "bench.json", self.to_json(), overwrite=True)
        for name, text in (("table.md", self.markdown()), ("index.html", render(self))):
            with atomic_file(folder / name, overwrite=True) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, as text."""
        header = ["method", "erased", "withstands", "kept near", "kept far", "integrity", "alignment"]
        header += [f"recovered: {name}" for name in self.attacks] + ["time", "memory", "changed", "size", "cells"]
        rows = []
        for row in self.rows:
            both = lambda i, rate=True: f"{value(i, rate)} {bounds(i, rate)}".strip()
            told = [both(i) for i in (row.erasure, row.withstood, row.near, row.far)]
            told.append(both(row.integrity, False))
            change = row.alignment
            told.append(MISSING if change is None else f"{change.value:+.3f} {bounds(change, False)}".strip())
            told += [both(row.recovered(name)) for name in self.attacks]
            memory, count = row.mean("peak_memory_bytes"), row.mean("parameters_changed")
            told += [seconds(row.mean("seconds")), size(None if memory is None else round(memory)), number(count)]
            stored = row.mean("bytes")
            told += [size(None if stored is None else round(stored)), f"{len(row.measured)} of {len(row.cells)}"]
            rows.append([row.method, *told])
        return header, rows

    def markdown(self) -> str:
        header, rows = self.table()
        line = lambda cells: "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"
        text = "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
        why = [f"- {row.method}: {w}" for row in self.rows for w in row.why]
        why += [f"- attack {name}: {w}" for name, w in self.unfit.items()]
        notes = [self.legend, *([self.context] if self.context else [])]
        return "\n\n".join([text, *notes, *(["Not measured:", "\n".join(why)] if why else [])]) + "\n"

    @property
    def legend(self) -> str:
        """What the columns are."""
        n, attacked = (self.configuration.get(name) for name in ("n", "n_attack"))
        each = f", of {n} pictures of each concept ({attacked} under attack)" if n and attacked else ""
        return (
            f"Means over cells (concepts and seeds){each}; in square brackets their 95 % intervals over sets of "
            "concepts (over seeds where there is one set), by Student's t, wide where there are few, which one cell or "
            "equal cells do not have. Time is the edit's, memory the process's peak, changed counts the "
            "parameters that differ from the original's, and size is what these take."
        )

    @property
    def context(self) -> str:
        """What the original shows of each concept, where the cells say it."""
        told = ", ".join(f"{concepts}: {percent(share)}" for concepts, share in self.seen.items())
        what = "Share of the original's own pictures in which the detector finds what was asked for"
        return f"{what}: {told}. Where that is small, nothing follows from what is erased." if told else ""


def attacks_of(cells: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells if cell.figures for name in cell.figures["attacks"]))


@dataclass(frozen=True)
class Spot:
    """A method on the plot: per cent across and pixels down, with the ends of both intervals; ``best`` on the front.

    ``label``: pixels down of its name, moved away from those of its neighbours.
    """

    method: str
    x: float
    y: float
    left: float
    right: float
    high: float
    low: float
    best: bool
    text: str
    label: float = 0.0


def front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names of the points that no other beats in one figure and equals in the other; more is better in both."""
    beaten = lambda p, q: q[0] >= p[0] and q[1] >= p[1] and q != p
    return {name for name, p in points.items() if not any(beaten(p, q) for q in points.values())}


def spots(rows: Sequence[Row]) -> tuple[list[Spot], list[tuple[float, str]], list[tuple[float, str]]]:
    """The methods on the plane of what is kept and what is withstood, and the ticks of both axes."""
    have = [(row, row.kept, row.withstood) for row in rows]
    told = [(row, k, w) for row, k, w in have if k is not None and w is not None and k.measured and w.measured]
    if not told:
        return [], [], []
    ends = lambda i: (i.value if i.low is None else i.low, i.value if i.high is None else i.high)
    left = min(0.9, int(10 * min(ends(k)[0] for _, k, _ in told)) / 10)
    floor = min(0.9, int(10 * min(ends(w)[0] for _, _, w in told)) / 10)
    x = lambda v: 12 + 84 * (v - left) / (1 - left)
    y = lambda v: BOTTOM - (BOTTOM - TOP) * (v - floor) / (1 - floor)
    best = front({row.method: (k.value, w.value) for row, k, w in told})
    made = [
        Spot(
            row.method, x(k.value), y(w.value), x(ends(k)[0]), x(ends(k)[1]), y(ends(w)[1]), y(ends(w)[0]),
            row.method in best, f"{row.method}: kept {percent(k.value)}, withstands {percent(w.value)}",
        )
        for row, k, w in told
    ]  # fmt: skip
    ticks = lambda low, at: [(at(low + (1 - low) * i / 4), percent(low + (1 - low) * i / 4)) for i in range(5)]
    return apart(made), ticks(left, x), ticks(floor, y)


def apart(dots: Sequence[Spot]) -> list[Spot]:
    """Names that would lie on one another are moved down, one line each."""
    placed: list[Spot] = []
    for dot in sorted(dots, key=lambda d: (d.y, d.x)):
        label = dot.y - 7
        while any(abs(d.label - label) < LINE and abs(d.x - dot.x) < NEIGHBOURS for d in placed):
            label += LINE
        placed.append(replace(dot, label=label))
    return placed


def render(report: BenchReport) -> str:
    """The page as text."""
    report = shown(report)
    header, rows = report.table()
    dots, across, up = spots(report.rows)
    page = environment().get_template("bench.html.j2")
    return page.render(report=report, header=header, rows=rows, dots=dots, across=across, up=up)
