"""The ledger: each method's central claim, measured again, with a baseline and an interval.

An entry is a module ``sfumato.ledger.NAME`` with one `Experiment` called ``EXPERIMENT``. ``run`` measures it seed
by seed, computes effect, interval and verdict, and writes ``docs/ledger/NAME.json``; ``table`` turns the results
into ``docs/ledger.md``. No verdict is written by hand.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sfumato.errors import BadInput
from sfumato.files import write_json
from sfumato.versions import versions

Pair = tuple[Sequence[float], Sequence[float]]
Table = dict[str, dict[str, float]]
"""Row -> column -> figure."""


@dataclass(frozen=True)
class Claim:
    """One sentence that can turn out false, and how it is measured.

    Attributes:
        sentence: the claim.
        method, baseline: what is compared with what.
        quantity: what is measured, for each item, with its unit.
        better: which direction the claim says the method moves the quantity.
    """

    sentence: str
    method: str
    baseline: str
    quantity: str
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Experiment:
    """A method's claims and the function that measures them all at one seed.

    ``measure(seed)`` returns, for every claim, the paired per-item values (method, baseline): the same prompts and
    seeds in both. What else it returns, under names that are no claims, are `Table`s of figures: they are written with
    their standard error over the seeds, and decide nothing. ``tuning`` says how settings were chosen, and on which
    seeds, none of which is in ``seeds``.
    """

    name: str
    paper: str
    claims: dict[str, Claim]
    seeds: tuple[int, ...]
    tuning: str
    measure: Callable[[int], dict[str, Pair | Table]]
    notes: str = ""


def effect(pairs: Sequence[Pair], better: str, draws: int = 4000) -> dict[str, float]:
    """Mean paired difference (positive = as claimed) and its 95 % interval over seeds and items together.

    A two-level bootstrap: seeds are drawn with replacement, then items within each drawn seed; percentiles 2.5 and
    97.5 of the means. ``pairs`` has one (method, baseline) pair of equally long lists for each seed.
    """
    sign = 1.0 if better == "higher" else -1.0
    per_seed = [sign * (np.asarray(m, float) - np.asarray(b, float)) for m, b in pairs]
    rng = np.random.default_rng(0)
    means = np.empty(draws)
    for i in range(draws):
        chosen = rng.integers(len(per_seed), size=len(per_seed))
        items = [per_seed[j][rng.integers(per_seed[j].size, size=per_seed[j].size)] for j in chosen]
        means[i] = np.mean([x.mean() for x in items])
    low, high = np.percentile(means, [2.5, 97.5])
    value = float(np.mean([d.mean() for d in per_seed]))
    return {"value": value, "low": float(low), "high": float(high)}


def verdict(interval: dict[str, float]) -> str:
    """Reproduced if the whole interval is on the claimed side of zero, not reproduced if on the other."""
    if interval["low"] > 0:
        return "reproduced"
    return "not reproduced" if interval["high"] < 0 else "inconclusive"


def load(name: str) -> Experiment:
    """The experiment of ledger entry ``name``.

    Raises:
        BadInput: there is no such entry.
    """
    try:
        return importlib.import_module(f"sfumato.ledger.{name.replace('-', '_')}").EXPERIMENT
    except (ModuleNotFoundError, AttributeError) as error:
        raise BadInput(f"no ledger entry {name!r}; there are: {', '.join(names())}") from error


def names() -> list[str]:
    """Ledger entries, in the order of their files."""
    here = Path(__file__).parent
    return sorted(p.stem.replace("_", "-") for p in here.glob("*.py") if "\nEXPERIMENT = " in p.read_text())


def run(name: str, folder: Path | str = "docs/ledger", progress: bool = True) -> dict:
    """Measure entry ``name`` at each of its seeds and write ``folder/NAME.json``; returns what was written."""
    experiment = load(name)
    began, per_seed = time.perf_counter(), []
    for i, seed in enumerate(experiment.seeds):
        per_seed.append(experiment.measure(seed))
        if progress:
            seconds = time.perf_counter() - began
            print(f"{name}: seed {seed} done ({i + 1} of {len(experiment.seeds)}, {seconds:.0f} s)", flush=True)
    results = {}
    for key, claim in experiment.claims.items():
        pairs = [result[key] for result in per_seed]
        interval = effect(pairs, claim.better)
        results[key] = {
            **asdict(claim),
            "method_mean": float(np.mean([np.mean(m) for m, _ in pairs])),
            "baseline_mean": float(np.mean([np.mean(b) for _, b in pairs])),
            "effect": interval,
            "interval": "95 %, bootstrap over seeds and items together",
            "verdict": verdict(interval),
            "per_seed": [
                {"seed": s, "method": float(np.mean(m)), "baseline": float(np.mean(b)), "n": len(m)}
                for s, (m, b) in zip(experiment.seeds, pairs, strict=True)
            ],
        }
    record = {
        "name": name,
        "paper": experiment.paper,
        "claims": results,
        "tuning": experiment.tuning,
        "notes": experiment.notes,
        "tables": {key: spread([r[key] for r in per_seed]) for key in per_seed[0] if key not in experiment.claims},
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {**versions(), "machine": _machine()},
    }
    write_json(Path(folder) / f"{name}.json", record, overwrite=True)
    return record


def spread(tables: Sequence[Table]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard error, over seeds, of each figure of the same table."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for row, columns in tables[0].items():
        for column in columns:
            values = np.array([table[row][column] for table in tables], float)
            error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
            result.setdefault(row, {})[column] = {"mean": float(values.mean()), "error": error}
    return result


def table(folder: Path | str = "docs/ledger") -> str:
    """The Markdown page of all results under ``folder``."""
    lines = [
        "# The ledger",
        "",
        "Each method's central claim, measured again by `sfumato ledger NAME`. The effect is the paired difference",
        "between method and baseline, positive where the claim says so; the verdict is computed from its interval.",
        "",
        "| entry | claim | method | baseline | effect [95 %] | verdict | time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    details: list[str] = []
    for path in sorted(Path(folder).glob("*.json")):
        record = json.loads(path.read_text())
        details += [f"## {record['name']} ({record['paper']})", ""]
        for claim in record["claims"].values():
            e = claim["effect"]
            lines.append(
                f"| {record['name']} | {claim['sentence']} | {claim['method']}: {claim['method_mean']:.3g} "
                f"| {claim['baseline']}: {claim['baseline_mean']:.3g} "
                f"| {e['value']:+.3g} [{e['low']:+.3g}, {e['high']:+.3g}] | {claim['verdict']} "
                f"| {record['seconds']:.0f} s |"
            )
            seeds = ", ".join(f"{s['seed']}: {s['method']:.3g} / {s['baseline']:.3g}" for s in claim["per_seed"])
            n = claim["per_seed"][0]["n"]
            details += [
                f"- **{claim['sentence']}** {claim['quantity'].rstrip('.')}; n = {n} for each seed. "
                f"Seed: method / baseline: {seeds}. Interval: {claim['interval']}.",
            ]
        details += [f"- Settings: {record['tuning']}"]
        details += [f"- {record['notes']}"] if record["notes"] else []
        for name, rows in record.get("tables", {}).items():
            columns = sorted({column for row in rows.values() for column in row}, key=_by_number)
            details += ["", f"| {name} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
            for row, cells in rows.items():
                shown = ["{mean:.3g} ± {error:.1g}".format(**cells[c]) if c in cells else "" for c in columns]
                details.append(f"| {row} | {' | '.join(shown)} |")
        details += [""]
    return "\n".join([*lines, "", *details])


def _by_number(text: str) -> list[tuple[int, str]]:
    """Sorts "25" before "100": files keep their keys in alphabetical order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _machine() -> str:
    import torch

    return f"{platform.machine()}, {torch.get_num_threads()} threads"
