"""``sfumato bench``: erasers, concepts, seeds and attacks on one model, and the settings for it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from sfumato.commands.links import links_of
from sfumato.commands.options import STEPS, parse
from sfumato.commands.tables import show_table
from sfumato.errors import BadInput, SfumatoError, unknown

EXAMPLE = "sfumato bench erase --model sketch --methods uce rece esd-x --concepts fish red --seeds 1 2 --out bench/"
TUNING = "sfumato bench tune --methods rece esd-x --concepts star blue --trials 6 --out trials/"
FATES = "sfumato bench compose --methods uce esd-x --concepts fish --seeds 1 2 3 --out fates/"
TABLE = "sfumato bench table --bench bench/ --out erasure.json"
KINDS = ("erase", "compose", "tune", "table")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options of the command; the fields of `sfumato.bench.Bench` come on top."""

    out: Path
    """Folder for the page (index.html), the table (table.md), all figures (bench.json) and the audits. One that a bench
    of the same settings has written is gone on with: methods, concepts and seeds may be added."""


@dataclass(frozen=True, kw_only=True)
class Chained:
    """Options of the command; the fields of `sfumato.bench.Fates` come on top."""

    compose: tuple[str, ...] = ()
    """What happens to the erased models, each by itself, as for `sfumato audit --compose`; by default fine-tuning on
    other pictures, merging with the original, half precision, a LoRA of rank 4, another scheduler, cached features, and
    four steps."""
    out: Path
    """Folder for the page (index.html), the table (table.md), all figures (fates.json) and the pictures. One that a
    bench of the same settings has written is gone on with."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Options of the command."""

    bench: Path
    """Folder of a finished `sfumato bench erase`, or its bench.json."""
    out: Path
    """File for the table; the package's own is src/sfumato/catalog/measured/erasure.json."""
    overwrite: bool = False
    """Replace the output if it exists."""


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Options of the command; the fields of `sfumato.bench.Tune` come on top."""

    out: Path
    """Folder for the trials and their list (trials.json); trials that are there are not repeated."""


def main(args: list[str]) -> None:
    kind = args[0] if args else ""
    if kind in ("-h", "--help"):
        print(f"usage: sfumato bench {{{','.join(KINDS)}}} [options]\n\nExample: {EXAMPLE}\n")
        print("erase:   methods, concepts, seeds and attacks on one model, in one table and one page\n"
              "compose: methods, and what happens to the erased models afterwards\n"
              "tune:    as many settings tried of every method, on concepts that no bench counts\n"
              "table:   what a bench of erasers measured, as the table that sfumato choose erase reads\n")  # fmt: skip
        print("sfumato bench erase --help lists the options.")
        return
    if not kind or kind.startswith("-"):
        raise BadInput(f"name what to do right after bench: {' or '.join(KINDS)}, as in `{EXAMPLE}`")
    if kind not in KINDS:
        raise unknown("kind of bench", kind, KINDS)
    {"erase": erase, "compose": compose, "tune": tune, "table": table}[kind](args[1:])


def erase(args: list[str]) -> None:
    """Methods side by side."""
    from sfumato.bench import Bench
    from sfumato.pipeline.saving import quiet

    about = (
        f"Example: {EXAMPLE}\n\nEvery method takes every set of concepts out of the model at every seed; every result "
        "is audited under every attack. Killed? The same command goes on where it stopped."
    )
    settings, own = parse("sfumato bench erase", args, Bench, Output, about=about, aliases=STEPS)
    said = shlex.join(["sfumato", *sys.argv[1:]])
    with quiet():
        report = Bench(**settings).run(
            own["out"], reproduce=said, announce=lambda plan: plan.show(), progress=lambda line: print(line, flush=True)
        )
    show_table(*report.table())
    for row in report.rows:
        for why in row.why:
            print(f"{row.method}: {why}")
    if report.context:
        print(report.context)
    print(f"open {own['out'] / 'index.html'}")
    _require(any(row.measured for row in report.rows))


def compose(args: list[str]) -> None:
    """Erasers by what happens to models afterwards."""
    from sfumato.bench import Fates
    from sfumato.pipeline.saving import quiet

    about = f"Example: {FATES}\n\nKilled? The same command goes on where it stopped."
    settings, own = parse("sfumato bench compose", args, Fates, Chained, about=about, aliases=STEPS)
    links = tuple(links_of(own["compose"], settings["model"]))
    said = shlex.join(["sfumato", *sys.argv[1:]])
    with quiet():
        report = Fates(**{**settings, "links": links}).run(
            own["out"], reproduce=said, announce=lambda plan: plan.show(), progress=lambda line: print(line, flush=True)
        )
    show_table(*report.table())
    for method, link, why in report.refused:
        print(f"{method}, {link}: {why}")
    print(f"open {own['out'] / 'index.html'}")
    _require(any(fate.figures is not None for fate in report.fates))


def tune(args: list[str]) -> None:
    """Settings of methods for one model."""
    from sfumato import catalog
    from sfumato.bench import Tune
    from sfumato.bench.tune import rows, save
    from sfumato.pipeline.saving import quiet

    about = (
        f"Example: {TUNING}\n\nAs many trials for every method. An asterisk marks the settings that it has now; of "
        "others it is told how much they score beyond those: an interval that holds 0 is no reason to change. What "
        "beats them is tried once more, on other concepts: "
        "sfumato bench tune --again trials/ --concepts tree --out again/"
    )
    settings, own = parse("sfumato bench tune", args, Tune, Trials, about=about, aliases=STEPS)
    with quiet():
        trials = Tune(**settings).run(
            own["out"], announce=lambda plan: plan.show(), progress=lambda line: print(line, flush=True)
        )
    save(own["out"], trials)
    grids = {name: tuple(catalog.get(name).load().GRID) for name in {trial.method for trial in trials}}
    show_table(("method", "settings", "score", "beyond the present", "of pictures"), rows(trials, grids))
    _require(any(trial.figures is not None for trial in trials))


def _require(measured: bool) -> None:
    """A bench of which nothing was measured has failed, whoever starts it."""
    if not measured:
        raise SfumatoError("no cell was measured: see above why, and start again with settings that fit the model")


def table(args: list[str]) -> None:
    """The table by which `sfumato choose erase` decides."""
    from sfumato.commands import choosing
    from sfumato.report import measured

    about = f"Example: {TABLE}\n\nA row a method, with its means over the cells of the bench. Nothing is run."
    [values] = parse("sfumato bench table", args, Table, about=about)
    asked = Table(**values)
    measured.make(asked.bench, asked.out, asked.overwrite)
    show_table(choosing.HEADER, choosing.table(asked.out))
    print("\n".join(choosing.advice(asked.out)))
