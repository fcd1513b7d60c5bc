"""As many settings tried of every eraser, on the embedded pipeline: docs/results/tuning.md.

    python scripts/tuning.py --work tuning       # hours; killed? the same command goes on where it stopped
    python scripts/tuning.py --work tuning --only page

What scores more than a class's preset, beyond the 95 % interval, goes into it by hand, and what is measured with the
preset is measured anew. The concepts and the seed are none of the leaderboard's. Trials are kept in
docs/results/tuning/, and gone on with from there.
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


def json_of(settings: Mapping[str, Any]) -> str:
    """Settings as they are written: the same whether they were read or are a class's."""
    return json.dumps(settings, sort_keys=True)


def winners(trials: Sequence[Trial]) -> list[Trial]:
    """Of each method the settings that surely beat its preset, if any do: the best of them."""
    present = {t.method: t for t in trials if t.first}
    best: dict[str, Trial] = {}
    for t in trials:  # a method's best come first
        more = t.beyond(present[t.method])
        if more is not None and more.low is not None and more.low > 0:
            best.setdefault(t.method, t)
    return list(best.values())


def page(trials: Sequence[Trial], command: str) -> str:
    """All of them, each method's best first."""
    grids = {name: tuple(catalog.get(name).load().GRID) for name in {t.method for t in trials}}
    told, won = rows(trials, grids), winners(trials)
    for t, row in zip(trials, told, strict=True):
        if t in won:
            row[2] = f"**{row[2]}**"
    better = f"There are such of {', '.join(t.method for t in won)}." if won else "There are none."
    if won:
        same = lambda t: json_of(catalog.get(t.method).load().presets.get("sketch", {})) == json_of(t.settings)
        better += (
            " They are the preset now, and what is measured with it was measured anew; the command below would try "
            "other settings beside them." if all(map(same, won)) else
            " They become the preset together with all figures that are measured with it."
        )  # fmt: skip
    return "\n".join([
        "# Settings of erasers, tried on the embedded pipeline",
        "",
        "As many settings of every method, its preset and others chosen at random from its grid, on an object and a "
        "colour, each erased by itself. Score: the mean of what is gone and of what is kept, over both. An asterisk "
        "marks what was the preset then.",
        "",
        "Bold: settings that score more than the preset's, beyond the 95 % interval of the difference (which takes the "
        f"two as independent, though they share prompts and noise). {better}",
        "",
        table(("method", "settings", "score", "beyond the preset", "of pictures [95 % intervals]"), told),
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
