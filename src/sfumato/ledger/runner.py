"""Measuring an entry cell by cell: finished cells are kept beside the result, and several run at a time."""

from __future__ import annotations

import hashlib
import importlib
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.cells import Failed, finished
from sfumato.errors import BadInput, SfumatoError
from sfumato.files import held, refuse_existing, sha256_of, write_json
from sfumato.foreign import read_json
from sfumato.plan import Plan, human_time, makespan
from sfumato.versions import versions

from .core import Experiment, Table, effect, load, verdict

PACKAGE = Path(__file__).resolve().parents[1]
JOBS = 2
"""Processes of one thread each, unless told otherwise."""
KEY = "key.json"


@dataclass(frozen=True)
class Cell:
    """One arm of an experiment at one seed; ``arm`` is "" where all is measured at once."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}" if self.arm else f"seed {self.seed}"

    @property
    def file(self) -> str:
        return "-".join([*re.findall(r"[\w.]+", self.arm), str(self.seed)]) + ".json"


def run(name: str, folder: Path | str = "ledger", jobs: int = JOBS, progress: bool = True) -> dict:
    """Measure entry ``name`` and write ``folder/NAME.json``; returns what was written.

    Every cell runs on one thread, so that the figures do not depend on ``jobs``. Cells that are finished when a run is
    killed wait in ``folder/.NAME``, and the next run goes on with the others, unless anything that they rest on has
    changed: then it says what, and starts anew.

    Args:
        name: of the entry.
        folder: for the result; one that is there is replaced.
        jobs: how many cells run at a time, each in a process of its own; an entry that measures seconds runs one.
        progress: show the plan first, and each cell as it is finished.

    Raises:
        BadInput: before anything is measured: no such entry, or the result cannot be written there.
        SfumatoError: a cell failed; the finished ones are kept.
    """
    if jobs < 1:
        raise BadInput(f"jobs must be at least 1, got {jobs}")
    experiment, target = load(name), Path(folder) / f"{name}.json"
    jobs = 1 if experiment.timed else jobs
    refuse_existing(target, overwrite=True)
    if target.is_dir():
        raise BadInput(f"{target} is a folder where the result is to be written: choose another folder")
    cells = cells_of(experiment)
    with held(Path(folder) / f".{name}") as kept:
        changed = _keep_if_unchanged(kept, _key(experiment))
        left = [cell for cell in cells if not (kept / cell.file).exists()]
        if progress:
            _plan(experiment, target, cells, left, jobs, changed).show()
        for done, cell in enumerate(_measure_all(experiment, left, kept, jobs), start=len(cells) - len(left) + 1):
            if progress:
                seconds = human_time(_read(kept / cell.file)["seconds"])
                print(f"{name}: {cell} done in {seconds} ({done} of {len(cells)})", flush=True)
            _check_seed(experiment, kept, cell.seed)
        results = {cell: _read(kept / cell.file) for cell in cells}
        record = _record(experiment, results, jobs)
        write_json(target, record, overwrite=True)
        for file in kept.iterdir():
            file.unlink()
    return record


def cells_of(experiment: Experiment) -> list[Cell]:
    """All seeds of an arm before the next arm: what the arms of a seed share and keep on disk is then made once."""
    return [Cell(arm, seed) for arm, seed in product(experiment.arms or ("",), experiment.seeds)]


def _check_seed(experiment: Experiment, kept: Path, seed: int) -> None:
    """Say at the first seed that is whole what no record can be made of, not after the last one.

    Raises:
        SfumatoError: a claim without its pairs, or a table that is none.
    """
    files = {arm: kept / Cell(arm, seed).file for arm in experiment.arms or ("",)}
    if not all(file.exists() for file in files.values()):
        return
    found = experiment.found({arm: _read(file)["figures"] for arm, file in files.items()})
    if missing := [name for name in experiment.claims if name not in found]:
        raise SfumatoError(f"{experiment.name}: nothing was measured for {', '.join(missing)}")
    for key, table in found.items():
        rows = list(table.values()) if isinstance(table, Mapping) else [None]
        if key not in experiment.claims and not all(isinstance(row, Mapping) for row in rows):
            raise SfumatoError(f"{experiment.name}: {key!r} is no table of rows and columns")


def _plan(
    experiment: Experiment, target: Path, cells: Sequence[Cell], left: Sequence[Cell], jobs: int, changed: list[str]
) -> Plan:
    arms = f" of {len(experiment.arms)} arms" if experiment.arms else ""
    title = f"ledger {experiment.name}: {len(experiment.seeds)} seeds{arms}, {jobs} at a time"
    if len(left) < len(cells):
        title += f"; {len(cells) - len(left)} of {len(cells)} were finished before"
    if changed:
        title += f"; what was finished before is measured anew, since other than then: {', '.join(changed)}"
    return Plan(title, seconds=expected(experiment, left, jobs), writes=[str(target)])


def expected(experiment: Experiment, cells: Sequence[Cell], jobs: int) -> float:
    """Seconds that these cells take, ``jobs`` at a time."""
    cost = experiment.cost
    return makespan([cost[cell.arm] if isinstance(cost, Mapping) else cost for cell in cells], jobs)


def _key(experiment: Experiment) -> dict[str, str]:
    """What figures rest on, each under the name by which a change of it is told."""
    module = importlib.import_module(getattr(experiment.measure, "__module__", __name__))
    entry = Path(module.__file__ or __file__)
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        if file != entry:
            digest.update(file.read_bytes())
    return {
        "the entry's file": sha256_of(entry),
        "sfumato's code": digest.hexdigest(),
        "the embedded models": sha256_of(PACKAGE / "assets" / "SHA256SUMS"),
        **_versions(),
    }


def _keep_if_unchanged(kept: Path, key: dict[str, str]) -> list[str]:
    """Clear ``kept`` of the cells of another key; what has changed, by name, if there were any."""
    there = [file for file in kept.glob("*.json") if file.name != KEY]
    before = _read(kept / KEY) if (kept / KEY).exists() else {}
    if before == key:
        return []
    for file in there:
        file.unlink()
    write_json(kept / KEY, key, overwrite=True)
    return [name for name in key if before.get(name) != key[name]] if there else []


def _measure_all(experiment: Experiment, cells: Sequence[Cell], kept: Path, jobs: int) -> Iterator[Cell]:
    """Measure the cells, ``jobs`` at a time, and yield each when its file is there."""
    for cell, result in finished(cells, partial(_measure, experiment), jobs=jobs):
        if isinstance(result, Failed):
            print(result.details, file=sys.stderr)
            raise SfumatoError(
                f"{experiment.name}: {cell} failed ({result.reason}); the cells that are finished are kept, so "
                "the same command goes on from there"
            )
        write_json(kept / cell.file, result, overwrite=True)
        yield cell


def _measure(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    began = time.process_time()  # of the processor, so that other work on the machine does not count
    figures = experiment.measure(cell.seed, *([cell.arm] if experiment.arms else []))
    return {"figures": figures, "seconds": time.process_time() - began}


def _read(file: Path) -> Any:
    return read_json(file, advice="remove it, and it is measured again")


def _record(experiment: Experiment, results: dict[Cell, Any], jobs: int) -> dict[str, Any]:
    """The result's file."""
    arms = experiment.arms or ("",)
    per_seed = [
        experiment.found({arm: results[Cell(arm, seed)]["figures"] for arm in arms}) for seed in experiment.seeds
    ]
    claims = {}
    for name, claim in experiment.claims.items():
        pairs = [result[name] for result in per_seed]
        interval = effect(pairs, claim.better)
        claims[name] = {
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
    seconds = [result["seconds"] for result in results.values()]
    return {
        "name": experiment.name,
        "paper": experiment.paper,
        "claims": claims,
        "tuning": experiment.tuning,
        "notes": experiment.notes,
        "tables": {key: spread([r[key] for r in per_seed]) for key in per_seed[0] if key not in experiment.claims},
        "seconds": round(makespan(seconds, jobs), 1),
        "processes": jobs,
        "versions": _versions(),
    }


def spread(tables: Sequence[Table]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard error, over seeds, of each figure of the same table."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for row, columns in tables[0].items():
        for column in columns:
            values = np.array([table[row][column] for table in tables], float)
            error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
            result.setdefault(row, {})[column] = {"mean": float(values.mean()), "error": error}
    return result


def _versions() -> dict[str, str]:
    return {**versions(), "machine": platform.machine()}
