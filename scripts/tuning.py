"""As many settings tried of every eraser, on the embedded pipeline: docs/results/tuning.md.

    python scripts/tuning.py --work tuning       # hours; killed? the same command goes on where it stopped
    python scripts/tuning.py --work tuning --only page

What wins goes by hand into the classes' presets. The concepts and the seed are none of the leaderboard's. Trials are
kept in docs/results/tuning/, and gone on with from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from commands import run
from erasure import ROOT, table
from sfumato import catalog
from sfumato.bench.tune import Trial, rows

COMMAND = (
    "sfumato bench tune --methods {} --concepts star blue --trials 3 --seed 0 --n 24 --n-retain 2 --steps 10 "
    "--out trials/"
)


def methods() -> list[str]:
    """The erasers that have something to tune."""
    return [m.name for m in catalog.methods("erase") if m.load().GRID]


def trial(told: Mapping[str, Any]) -> Trial:
    """One of ``trials.json``."""
    return Trial(**{name: told[name] for name in ("method", "settings", "first", "figures", "why")})


def copy_trials(source: Path, target: Path) -> None:
    """The files of single trials, without the originals' pictures and the list."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*-*.json"):
        shutil.copy(file, target)


def page(trials: Sequence[Trial], command: str) -> str:
    """All of them, each method's best first."""
    grids = {name: tuple(catalog.get(name).load().GRID) for name in {t.method for t in trials}}
    told = rows(trials, grids)
    seen: set[str] = set()
    for t, row in zip(trials, told, strict=True):
        if t.parts and t.method not in seen:
            row[2] = f"**{row[2]}**"
            seen.add(t.method)
    return "\n".join([
        "# Settings of erasers, tried on the embedded pipeline",
        "",
        "As many settings of every method, chosen at random from its grid, on an object and a colour, each erased by "
        "itself. Score: the mean of what is gone and of what is kept, over both; an asterisk marks the settings that "
        "the preset had, bold what won.",
        "",
        table(("method", "settings", "score", "of pictures [95 % intervals]"), told),
        "",
        "```",
        command,
        "```",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the trials, kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--only", choices=("trials", "page"), help="by default both")
    args = parser.parse_args()
    made, kept = args.work / "trials", args.docs / "results" / "tuning"
    copy_trials(kept, made)
    command = COMMAND.format(" ".join(methods()))
    if args.only != "page":
        run(command, args.work)
    copy_trials(made, kept)
    if args.only != "trials":
        trials = [trial(told) for told in json.loads((made / "trials.json").read_text())]
        (args.docs / "results" / "tuning.md").write_text(page(trials, command))


if __name__ == "__main__":
    main()
