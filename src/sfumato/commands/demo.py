"""``sfumato demo``: the whole line on the embedded model, in minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from sfumato import catalog
from sfumato.commands.audit import summary
from sfumato.commands.erase import check_words, erase
from sfumato.commands.options import parse
from sfumato.commands.verb import Where, load, provenance
from sfumato.files import refuse_existing
from sfumato.plan import Plan, human_time

EXAMPLE = "sfumato demo --concept star --out sfumato-demo"


@dataclass(frozen=True, kw_only=True)
class Demo(Where):
    """Options of the command."""

    out: Path = Path("sfumato-demo")
    """Folder for erased/ (a diffusers folder) and report/ (index.html, report.json)."""
    concept: str = "star"
    """What to erase: an object, colour, background or style of the sketch world."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\nErase a concept from the embedded model with RECE and audit the result."
    options = Demo(**parse("sfumato demo", args, Demo, about=about)[0])
    refuse_existing(options.out, options.overwrite)
    check_words("sketch", (options.concept,))
    erased_folder, report_folder = options.out / "erased", options.out / "report"
    writes = [f"{erased_folder}/ (a diffusers folder)", f"{report_folder}/ (index.html, report.json)"]
    title = f"erase {options.concept!r} from the embedded model with RECE, then audit and attack it"
    Plan(title, time="at most 3 min on two CPU cores", writes=writes).show()

    from sfumato.audit import audit

    start = time.perf_counter()
    entry = catalog.get("rece", "erase")
    method = entry.load()(concepts=(options.concept,))
    pipe = load("sketch", options)
    erased, cost = erase(method, pipe)
    record = {**provenance(entry, method, pipe, "sketch"), "cost": cost}
    erased.save(erased_folder, overwrite=options.overwrite, provenance=record)
    report = audit(before="sketch", after=str(erased_folder), concepts=(options.concept,))
    report.save(report_folder, overwrite=options.overwrite)
    summary(report)
    print(f"erased in {human_time(cost['seconds'])}, all in {human_time(time.perf_counter() - start)}")
    print(f"open {report_folder / 'index.html'}")
