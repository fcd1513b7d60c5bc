"""Which eraser: facts that its class states, and what a bench measured of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

from sfumato import catalog
from sfumato.report import measured
from sfumato.report.words import MISSING, bounds, percent, seconds, value

HEADER = ("method", "trains", "pictures", "removable", "erased", "withstands", "kept near", "kept far", "time",
          "cells")  # fmt: skip
NONE = (
    "Nothing was measured yet: sfumato bench erase --out bench/ measures, and sfumato bench table --bench bench/ makes "
    "the table that stands here."
)
ENOUGH = 0.9
"""The share of pictures that must be without the concept for a method to be chosen by anything else."""


def facts(cls: type[Any]) -> dict[str, str]:
    """What an eraser's class says of itself.

    "trains": whether weights or an adapter are fine-tuned; "pictures": whether it learns from pictures, which are drawn
    where none are given; "removable": whether what it adds can be taken off again, leaving the model as it was.
    """
    from sfumato.train.schedule import Tuning

    names = {f.name for f in dataclasses.fields(cls)}
    lora = "trained" in names and "lora" in get_args(get_type_hints(cls)["trained"])
    return {
        "trains": "yes" if issubclass(cls, Tuning) else "no",
        "pictures": "given or drawn" if cls.PICTURES & names else "no",
        "removable": "yes" if cls.removable else "with --trained lora" if lora else "no",
    }


def table(file: Path | None = None) -> list[tuple[str, ...]]:
    """One row an eraser under `HEADER`, those that withstand the most first, then in the catalogue's order."""
    found = measured.rows(file)
    held = lambda name: found[name].withstands or 0.0 if name in found else -1.0
    entries = sorted(catalog.methods("erase"), key=lambda m: held(m.name), reverse=True)
    return [(m.name, *facts(m.load()).values(), *figures(found.get(m.name))) for m in entries]


def figures(row: measured.Row | None) -> tuple[str, ...]:
    """The measured columns in words."""
    if row is None:
        return (*(MISSING,) * 5, "0")
    rates = [row.interval(column) for column in ("erased", "withstands", "near", "far")]
    return (*(f"{value(i)} {bounds(i)}".strip() for i in rates), seconds(row.seconds), str(row.cells))


def advice(file: Path | None = None) -> list[str]:
    """What the table decides, a sentence a question; that nothing was measured, where there is none."""
    found = measured.rows(file)
    if not found:
        return [NONE]
    known = {m.name: facts(m.load()) for m in catalog.methods("erase")}
    gone = {n: r for n, r in found.items() if n in known and r.erased is not None and r.erased >= ENOUGH}
    if not gone:
        return [f"No method erased in {percent(ENOUGH)} of the pictures. Measured {measured.conditions(file)}."]
    free = {n: r for n, r in gone.items() if known[n]["trains"] == "no"}
    # What is removable as a LoRA alone was measured as something else.
    off = {n: r for n, r in gone.items() if known[n]["removable"] == "yes"}
    told = [
        _best("Withstands the most", gone, "withstands"),
        _best("Keeps what is near the best", gone, "near"),
        _best("Without training, withstands the most", free, "withstands"),
        _best("Can be taken off again, withstands the most", off, "withstands"),
    ]
    return [*filter(None, told), f"Measured {measured.conditions(file)}; only what erased in {percent(ENOUGH)} counts."]


def line(entry: catalog.Method, file: Path | None = None) -> str:
    """The same of one method, for its ``--help``."""
    told = zip(HEADER[1:], (*facts(entry.load()).values(), *figures(measured.rows(file).get(entry.name))), strict=True)
    return "; ".join(f"{name}: {words}" for name, words in told) + "."


def _best(question: str, rows: dict[str, measured.Row], column: str) -> str:
    have = {name: i for name, row in rows.items() if (i := row.interval(column)) is not None}
    if not have:
        return ""
    top = max(i.value for i in have.values())
    names = ", ".join(f"{name} ({f'{value(i)} {bounds(i)}'.strip()})" for name, i in have.items() if i.value == top)
    # An order that other cells could turn round is no order.
    reach = [name for name, i in have.items() if i.value < top and i.high is not None and i.high >= top]
    return f"{question}: {names}" + (f"; as much by the intervals of: {', '.join(reach)}" if reach else "") + "."
