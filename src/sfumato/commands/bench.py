"""``sfumato bench erase``: erasers, concepts, seeds and attacks on one model, in one table and one page."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from sfumato.commands.options import STEPS, parse
from sfumato.commands.tables import show_table
from sfumato.errors import BadInput, unknown

EXAMPLE = "sfumato bench erase --model sketch --methods uce rece esd-x --concepts fish red --seeds 1 2 --out bench/"
KINDS = ("erase",)


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options of the command; the fields of `sfumato.bench.Bench` come on top."""

    out: Path
    """Folder for the page (index.html), the table (table.md), all figures (bench.json) and the audits. One that a bench
    of the same settings has written is gone on with: methods, concepts and seeds may be added."""


def main(args: list[str]) -> None:
    about = (
        f"Example: {EXAMPLE}\n\nEvery method takes every set of concepts out of the model at every seed; every result "
        "is audited under every attack. Killed? The same command goes on where it stopped."
    )
    kind = args[0] if args else ""
    if kind in ("-h", "--help"):
        print(f"usage: sfumato bench {{{','.join(KINDS)}}} [options]\n\n{about}\n")
        print("sfumato bench erase --help lists the options.")
        return
    if not kind or kind.startswith("-"):
        raise BadInput(f"name what to compare right after bench: {', '.join(KINDS)}, as in `{EXAMPLE}`")
    if kind not in KINDS:
        raise unknown("kind of bench", kind, KINDS)
    from sfumato.bench import Bench
    from sfumato.pipeline.saving import quiet

    settings, own = parse("sfumato bench erase", args[1:], Bench, Output, about=about, aliases=STEPS)
    said = shlex.join(["sfumato", *sys.argv[1:]])
    with quiet():
        report = Bench(**settings).run(
            own["out"], reproduce=said, announce=lambda plan: plan.show(), progress=lambda line: print(line, flush=True)
        )
    show_table(*report.table())
    for row in report.rows:
        for why in row.why:
            print(f"{row.method}: {why}")
    print(f"open {own['out'] / 'index.html'}")
