"""``sfumato audit``: what was erased, what was kept, and a report page that shows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.commands.options import STEPS, parse
from sfumato.commands.tables import show_table
from sfumato.files import refuse_existing

if TYPE_CHECKING:
    from sfumato.report.schema import AuditRecord

EXAMPLE = "sfumato audit --before sketch --after erased/ --concept star --out report/"


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options of the command; the fields of `sfumato.audit.Audit` come on top."""

    out: Path
    """Folder for the report: index.html and report.json."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    from sfumato.audit import Audit
    from sfumato.pipeline.saving import quiet

    settings, own = parse("sfumato audit", args, Audit, Output, about=f"Example: {EXAMPLE}", aliases=STEPS)
    options = Output(**own)
    refuse_existing(options.out, options.overwrite)
    writes = [f"{options.out}/ (index.html, report.json)"]
    with quiet():  # the audit's own bars are enough
        report = Audit(**settings).run(lambda plan: replace(plan, writes=writes).show())
    report.save(options.out, overwrite=options.overwrite)
    summary(report)
    print(f"report: {options.out / 'index.html'}")


def summary(report: AuditRecord) -> None:
    """The figures that decide, as a short table."""
    from sfumato.report.words import average, full

    rows = [(f"erased: {concept}", full(rate)) for concept, rate in report.erasure.items()]
    rows += [(f"  in {language}", full(found.erased)) for language, found in report.languages.items()]
    kept = average(list(report.retention.values()))
    rows.append((f"kept: mean of {len(report.retention)} others", full(kept)))
    if report.integrity:
        rows.append(("integrity (0 = same pictures)", full(report.integrity.mean, rate=False)))
    for name, attack in report.attacks.items():
        rows += [(f"recovered by {name}", full(attack.recovered)), ("  control", full(attack.control))]
    show_table(("", "share of pictures, 95 % interval"), rows)
