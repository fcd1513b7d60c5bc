"""``sfumato audit``: what was erased, what was kept, and a report page that shows it."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.commands.links import links_of
from sfumato.commands.options import STEPS, parse
from sfumato.commands.tables import show_table
from sfumato.files import held, refuse_existing

if TYPE_CHECKING:
    from sfumato.audit import Audit
    from sfumato.report.schema import AuditRecord

EXAMPLE = "sfumato audit --before sketch --after erased/ --concept star --out report/"
CHAINED = "sfumato audit --before sketch --after erased/ --concept star --compose finetune,cast:bfloat16 --out chain/"


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options of the command; the fields of `sfumato.audit.Audit` come on top."""

    out: Path
    """Folder for the report: index.html and report.json."""
    compose: tuple[str, ...] = ()
    """What happens to the edited model afterwards, one link after the other, with an audit after each: METHODs of
    erase, distill, steer and customize with their flags ("distill multistep-cm --updates 200"), finetune, merge MODEL,
    cast DTYPE, scheduler NAME, export FORMAT, adapter FILE; several with commas between them. Attacks are then run
    where --attack asks for some."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    from sfumato.audit import Audit
    from sfumato.pipeline.saving import quiet

    chained = any(arg.partition("=")[0] == "--compose" for arg in args)
    settings, own = parse(
        "sfumato audit", args, Audit, Output, about=f"Example: {EXAMPLE}\n\nWith a chain: {CHAINED}", aliases=STEPS,
        defaults={"attacks": ()} if chained else None,
    )  # fmt: skip
    options = Output(**own)
    refuse_existing(options.out, options.overwrite)
    if options.compose:
        compose(Audit(**settings), options)
        return
    writes = [f"{options.out}/ (index.html, report.json)"]
    with quiet():  # the audit's own bars are enough
        report = Audit(**settings).run(lambda plan: replace(plan, writes=writes).show())
    report.save(options.out, overwrite=options.overwrite)
    summary(report)
    print(f"report: {options.out / 'index.html'}")


def compose(audit: Audit, options: Output) -> None:
    """Audit a chain; what its links train is kept in ``OUT.training`` until the report is whole."""
    from sfumato.audit.chain import Chain
    from sfumato.pipeline.saving import quiet

    links = links_of(options.compose, str(audit.before))
    writes = [f"{options.out}/ (index.html, composition.json, and an audit for each link)"]
    state = options.out.parent / f"{options.out.name}.training"
    with held(state), quiet():
        made = Chain(audit=audit, links=links).run(
            state, lambda plan: replace(plan, writes=writes).show(), lambda stage: print(f"{stage.title}: audited")
        )
        made = replace(made, reproduce=shlex.join(["sfumato", *sys.argv[1:]]))
        made.save(options.out, options.overwrite)
        shutil.rmtree(state)
    show_table(made.header, made.rows())
    print(made.verdict)
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
