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
from sfumato.errors import BadInput
from sfumato.files import held, refuse_existing
from sfumato.text import counted

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
    apart: bool = False
    """With --compose: each link happens to the edited model itself, not to what the links before it left."""
    save_model: Path | None = None
    """With --compose: folder for the model that the last link leaves, with adapters added to its weights. How it was
    drawn from (another scheduler, methods of steer) is no part of it."""
    evidence: Path | None = None
    """Folder for all that a reviewer needs to check the audit without us: the report, every picture, seeds, hashes,
    versions; and a ZIP of it. `sfumato verify` reads both."""
    key: Path | None = None
    """Sign the evidence with this Ed25519 private key (PEM, `openssl genpkey -algorithm ed25519`)."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    from sfumato.audit import Audit
    from sfumato.audit.plan import plan as plan_of
    from sfumato.pipeline.saving import quiet

    chained = any(arg.partition("=")[0] == "--compose" for arg in args)
    settings, own = parse(
        "sfumato audit", args, Audit, Output, about=f"Example: {EXAMPLE}\n\nWith a chain: {CHAINED}", aliases=STEPS,
        defaults={"attacks": ()} if chained else None,
    )  # fmt: skip
    options = Output(**own)
    refuse_existing(options.out, options.overwrite)
    _check(options)
    if options.compose:
        compose(Audit(**settings), options)
        return
    writes = [f"{options.out}/ (index.html, report.json)"]
    audit = Audit(**settings)
    with quiet():  # the audit's own bars are enough
        setup = audit.prepare()
        replace(plan_of(setup), writes=writes).show()
        drawn, attacked = audit.draw(setup), audit.attack(setup)
        report = audit.report(setup, drawn, attacked, audit.judge(setup, drawn, attacked))
    report.save(options.out, overwrite=options.overwrite)
    if options.evidence is not None:
        from sfumato.audit.evidence import Evidence

        line = shlex.join(["sfumato", *sys.argv[1:]])
        Evidence(setup, drawn, attacked, report, line, options.key).save(options.evidence, options.overwrite)
    summary(report)
    print(f"report: {options.out / 'index.html'}")
    if options.evidence is not None:
        line = shlex.join(["sfumato", "verify", str(options.evidence)])
        print(f"evidence: {options.evidence} and {options.evidence}.zip; check it: {line}")


def _check(options: Output) -> None:
    """Refuse before the work what could not be written after it."""
    from sfumato.audit.evidence import private_key, require_cryptography

    if options.save_model is not None:
        if not options.compose or options.apart:
            raise BadInput("--save-model writes what a chain of links leaves: give the links with --compose, not apart")
        refuse_existing(options.save_model, options.overwrite)
    if options.evidence is None:
        if options.key is not None:
            raise BadInput("--key signs evidence: say where it goes with --evidence")
        return
    if options.compose:
        raise BadInput(
            "evidence is of one audit: write the chain's last model with --save-model, and audit that with --evidence"
        )
    out, evidence = options.out.resolve(), options.evidence.resolve()
    if out == evidence or out in evidence.parents or evidence in out.parents:
        raise BadInput("--evidence and --out are folders of their own, of which neither lies in the other")
    refuse_existing(options.evidence, options.overwrite)
    refuse_existing(options.evidence.with_name(f"{options.evidence.name}.zip"), options.overwrite)
    if options.key is not None:
        require_cryptography()
        private_key(options.key)


def compose(audit: Audit, options: Output) -> None:
    """Audit a chain; what its links train is kept in ``OUT.training`` until the report is whole."""
    from sfumato.audit.chain import Chain
    from sfumato.audit.protocol import edit_record
    from sfumato.pipeline.saving import quiet

    links = links_of(options.compose, str(audit.before))
    writes = [f"{options.out}/ (index.html, composition.json, and an audit for each link)"]
    if options.save_model:
        writes.append(f"{options.save_model}/ (the last link's model)")
    chain = Chain(audit=audit, links=links, apart=options.apart)
    state = options.out.parent / f"{options.out.name}.training"
    told = {**edit_record(audit.after, None), "afterwards": chain.titles}
    save = options.save_model and (lambda pipe: pipe.save(options.save_model, options.overwrite, provenance=told))
    with held(state), quiet():
        made = chain.run(
            state, lambda plan: replace(plan, writes=writes).show(), lambda stage: print(f"{stage.title}: audited"),
            last=save or None,
        )  # fmt: skip
        made = replace(made, reproduce=shlex.join(["sfumato", *sys.argv[1:]]))
        made.save(options.out, options.overwrite)
        if whole := options.apart or not made.refused:  # what links have trained serves the same command, mended
            shutil.rmtree(state)
    show_table(made.header, made.rows())
    for title, why in [*((stage.title, stage.said) for stage in made.stages if stage.said), *made.refused.items()]:
        print(f"{title}: {why}")
    print(made.verdict)
    print(f"report: {options.out / 'index.html'}")
    if not whole:
        raise BadInput(f"{next(iter(made.refused))} could not be: the report ends before it; mend the link, and start "
                       "the same command again with --overwrite")  # fmt: skip


def summary(report: AuditRecord) -> None:
    """The figures that decide, as a short table."""
    from sfumato.report.verdict import shown_before
    from sfumato.report.words import count, full, kept, percent

    rows = []
    for concept, rate in report.erasure.items():
        rows.append((f"erased: {concept}", full(rate)))
        rows.append(("  shown by the original", percent(shown_before(report, concept))))
    rows += [(f"  in {language}", full(found.erased)) for language, found in report.languages.items()]
    others = len(report.retention)
    rows.append(("kept: " + (f"mean of {others} others" if others > 1 else "the other concept" if others else "others"),
                 full(kept(report))))  # fmt: skip
    if report.integrity:
        n = report.integrity.mean.n
        told = full(report.integrity.mean, rate=False).removesuffix(f", {count(report.integrity.mean)}")
        rows.append((f"{report.integrity.distance} of pictures kept (0 = the same)", f"{told}, {counted(n, 'prompt')}"))
    for name, attack in report.attacks.items():
        rows += [(f"recovered by {name}", full(attack.recovered)), ("  control", full(attack.control))]
        rows.append(("  on the original", full(attack.original)))
    show_table(("", "share of pictures (or as named), 95 % interval"), rows)
