"""As many settings tried of every eraser, on the embedded pipeline: docs/results/tuning.md.

    python scripts/tuning.py --work tuning       # hours; killed? the same command goes on where it stopped
    python scripts/tuning.py --work tuning --only again
    python scripts/tuning.py --work tuning --only page

What scores more than a class's preset, beyond the 95 % interval, is tried again beside it on other concepts. What does
so there, too, goes into the preset by hand, and what is measured with that is measured anew. Then other settings are
drawn: the page's are gone on with by ``again`` and ``page`` alone. The concepts and the seed are none of the
leaderboard's. Trials are kept in docs/results/tuning/, and gone on with from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from commands import run
from erasure import ROOT, table
from sfumato import catalog
from sfumato.bench.tune import Trial, load, rows, winners

ALIKE = "--seed 0 --n 24 --n-retain 2 --steps 10"
COMMAND = f"sfumato bench tune --methods {{}} --concepts star blue --trials 3 {ALIKE} --out trials/"
AGAIN = f"sfumato bench tune --again trials/ --concepts tree green pixel {ALIKE} --out again/"
HEADER = ("method", "settings", "score", "beyond the preset", "of pictures [95 % intervals]")


def methods() -> list[str]:
    """The erasers that have something to tune."""
    return [m.name for m in catalog.methods("erase") if m.load().GRID]


def copy_trials(source: Path, target: Path) -> None:
    """The files of single trials, and the list; not the originals' pictures."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        shutil.copy(file, target)


def is_preset(trial: Trial) -> bool:
    """Whether a method has these settings now."""
    told = lambda settings: json.dumps(settings, sort_keys=True)
    return told(catalog.get(trial.method).load().presets.get("sketch", {})) == told(trial.settings)


def marked(trials: Sequence[Trial]) -> list[list[str]]:
    """The rows of a table, in which the score of those that surely beat their preset is bold."""
    grids = {name: tuple(catalog.get(name).load().GRID) for name in {t.method for t in trials}}
    told, won = rows(trials, grids), winners(trials)
    for t, row in zip(trials, told, strict=True):
        if t in won:
            row[2] = f"**{row[2]}**"
    return told


def names(trials: Sequence[Trial]) -> str:
    return ", ".join(t.method for t in trials) or "none"


def page(trials: Sequence[Trial], again: Sequence[Trial], command: str) -> str:
    """All of them, each method's best first, and those that were tried again."""
    won = winners(again)
    adopted = [t for t in won if is_preset(t)]
    return "\n".join([
        "# Settings of erasers, tried on the embedded pipeline",
        "",
        "As many settings of every method, its preset and others chosen at random from its grid, on an object and a "
        "colour, each erased by itself. Score: the mean of what is gone and of what is kept, over all concepts. An "
        "asterisk marks what was the preset then.",
        "",
        "Bold: settings that score more than that preset's, beyond the 95 % interval of the difference (which takes "
        f"the two as independent, though they share prompts and noise): {names(winners(trials))}.",
        "",
        table(HEADER, marked(trials)),
        "",
        "## Tried again",
        "",
        "The best of many trials owes part of its score to luck, and two concepts are few. What had beaten a preset "
        "was tried again beside it, on another object, another colour and a style. A preset is changed for what beats "
        f"it there, too: {names(won)}. Changed since, with all figures that are measured with it: {names(adopted)}.",
        "",
        table(HEADER, marked(again)) if again else "None.",
        "",
        "```",
        command,
        AGAIN,
        "```",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the trials, kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--only", choices=("trials", "again", "page"), help="by default all")
    args = parser.parse_args()
    kept, folders = args.docs / "results" / "tuning", {"trials": "", "again": "again"}
    command = COMMAND.format(" ".join(methods()))
    for name, there in folders.items():
        copy_trials(kept / there, args.work / name)
        if args.only in (None, name):
            run(command if name == "trials" else AGAIN, args.work)
            copy_trials(args.work / name, kept / there)
    if args.only in (None, "page"):
        first, again = (load(args.work / name) for name in folders)
        (args.docs / "results" / "tuning.md").write_text(page(first, again, command))


if __name__ == "__main__":
    main()
