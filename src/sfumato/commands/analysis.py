"""``sfumato steer METHOD --analyse``: what a method says of a model, as tables and a figure."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import catalog
from sfumato.commands.sample import Sample, read_seeds
from sfumato.commands.tables import show_table
from sfumato.commands.verb import equipped, load_any
from sfumato.files import atomic_folder, refuse_existing, write_json
from sfumato.plan import Plan
from sfumato.text import counted

if TYPE_CHECKING:
    from sfumato.steer.base import Analysis

SHOWN = 12
"""Rows of a table in the terminal; all are in its file."""


def analyse(entry: catalog.Method, patch: Any, options: Sample) -> None:
    """Write analysis.json, a CSV file for each table and, where matplotlib is installed, analysis.png."""
    refuse_existing(options.out, options.overwrite)
    seeds = read_seeds(options.seeds)
    model = equipped(load_any(options.model, options), options.model, options)
    jobs = [(prompt, seed) for prompt in options.prompts for seed in seeds]
    steps = model.sampling_steps if options.sampling_steps is None else options.sampling_steps
    drawn = f" and {counted(len(jobs), 'picture')} with {counted(steps, 'step')}" if jobs else ""
    writes = [f"{options.out}/ (analysis.json, CSV tables, analysis.png)"]
    Plan(f"{entry.name}: analysis of {options.model}{drawn}", writes=writes).show()
    asked = [prompt for prompt, _ in jobs] or None
    found = patch.analyse(model, asked, [seed for _, seed in jobs] or seeds, steps)
    record = {
        "method": {"name": entry.name, "verb": entry.verb, "paper": str(entry.paper), "configuration": asdict(patch)},
        "model": {"model": options.model, **model.describe()},
        "prompts": options.prompts,
        "seeds": seeds,
        "sampling_steps": steps,
        "axis": found.axis,
        "panels": _plain(found.panels),
        "tables": _plain(found.tables),
        "notes": list(found.notes),
    }
    with atomic_folder(options.out, options.overwrite) as folder:
        write_json(folder / "analysis.json", record)
        for name, rows in found.tables.items():
            _write_table(folder / f"{name}.csv", rows)
        drawn_figure = _draw(folder / "analysis.png", found)
    for name, rows in found.tables.items():
        print(name)
        show_table(tuple(rows[0]), [tuple(_word(x) for x in row.values()) for row in rows[:SHOWN]])
    print(*found.notes, f"analysis in {options.out}", sep="\n")
    if not drawn_figure:
        print("no plot: matplotlib is not installed (pip install 'sfumato[plots]')")


def _write_table(path: Path, rows: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _word(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def _plain(x: Any) -> Any:
    """``x`` with None where JSON has no number."""
    if isinstance(x, float) and not math.isfinite(x):
        return None
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    return [_plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def _draw(path: Path, found: Analysis) -> bool:
    """The panels below each other; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = found.panels
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.6 * len(panels)), layout="constrained", squeeze=False)
    for axis, (title, curves) in zip(axes[:, 0], panels.items(), strict=True):
        colours = plt.get_cmap("viridis")
        for i, (name, (x, y)) in enumerate(curves.items()):
            axis.plot(x, y, color=colours(i / max(1, len(curves) - 1) * 0.9), label=name)
        axis.set(xlabel=found.axis, title=title)
        axis.invert_xaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150, metadata={"Software": "sfumato"})
    plt.close(figure)
    return True
