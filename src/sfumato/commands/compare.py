"""``sfumato compare``: two audits side by side, or quality against cost of a teacher and its students."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from sfumato.commands.options import STEPS, parse
from sfumato.commands.tables import show_table
from sfumato.commands.verb import Where, load_any
from sfumato.errors import BadInput
from sfumato.fields import Count, Seed, at_least
from sfumato.files import refuse_existing
from sfumato.memory import require_memory
from sfumato.plan import Plan
from sfumato.text import counted

EXAMPLE = "sfumato compare report-uce/ report-rece/ --out comparison/"
COST = "sfumato compare --teacher sketch --students student-4/ student-2/ --out cost/"


@dataclass(frozen=True, kw_only=True)
class Compare(Where):
    """Options of the command."""

    reports: Annotated[tuple[Path, ...], Positional] = ()
    """Two folders written by `sfumato audit`."""
    out: Path
    """Folder for the page (index.html), and cost.json for quality against cost."""
    teacher: str | None = None
    """Instead of reports: a model, to be drawn from with several samplers at several numbers of steps."""
    students: tuple[str, ...] = ()
    """Models distilled from it, each drawn from as it samples by itself."""
    patches: tuple[str, ...] = ()
    """Methods of the verb steer, as NAME or NAME:PRESET, on the teacher at the largest number of steps."""
    sampling_steps: tuple[Count, ...] = (2, 4, 8, 16, 25, 50)
    """The teacher's numbers of steps."""
    samplers: tuple[str, ...] = ("ddim", "addim", "dpm++")
    """The teacher's samplers."""
    data: str = ""
    """Where prompts and real pictures come from; by default, for models of the sketch world, from there."""
    n: Annotated[int, at_least(2)] = 256
    """Pictures drawn in each way."""
    n_real: Annotated[int, at_least(2)] = 2048
    """Real pictures that they are compared with."""
    extractor: str = "oracle"
    """Of the features for the Fréchet distance, as for `sfumato score`."""
    weights: str | None = None
    """Safetensors file of the extractor "inception"."""
    batch: Count = 64
    """Pictures drawn together; decides the seconds."""
    seed: Seed = 0
    """Of prompts and noise."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\nRefused where the protocols differ; the message names the fields."
    about += f"\n\nQuality against cost: {COST}"
    options = Compare(**parse("sfumato compare", args, Compare, about=about, aliases=STEPS)[0])
    if options.teacher is None and len(options.reports) != 2:
        raise BadInput(f"name two reports, as in `{EXAMPLE}`, or a teacher, as in `{COST}`")
    if options.teacher is not None and options.reports:
        raise BadInput("give two reports or a teacher, not both")
    refuse_existing(options.out, options.overwrite)
    (audits if options.teacher is None else cost)(options)
    print(f"open {options.out / 'index.html'}")


def audits(options: Compare) -> None:
    """Two reports side by side."""
    from sfumato.report import compare
    from sfumato.report.schema import AuditRecord
    from sfumato.report.words import full

    first, second = map(AuditRecord.load, options.reports)
    rows = [
        (f"{r.group}: {r.label}", full(r.first, rate=r.rate), full(r.second, rate=r.rate))
        for r in compare.rows(first, second)
    ]
    compare.save(first, second, options.out, options.overwrite)
    show_table(("95 % intervals", *map(str, options.reports)), rows)


def cost(options: Compare) -> None:
    """Quality against cost."""
    from sfumato.audit.cost import measure, ways
    from sfumato.report.words import full, number

    teacher = load_any(options.teacher, options)
    for count in (options.n, options.n_real):
        require_memory(12 * teacher.size**2 * count, f"{count:,} pictures")
    students = {name: load_any(name, options) for name in options.students}
    methods = {name: distilled_by(name) for name in students}
    chosen = ways(teacher, students, options.sampling_steps, options.samplers, options.patches, methods)
    writes = [f"{options.out}/ (index.html, cost.json)"]

    def announce(seconds: float) -> None:
        title = f"{counted(options.n, 'picture')} in each of {counted(len(chosen), 'way')}"
        Plan(title, seconds=seconds, writes=writes).show()

    names = ("data", "n", "n_real", "seed", "batch", "extractor", "weights")
    report = measure(chosen, **{name: getattr(options, name) for name in names}, progress=True, announce=announce)
    report = dataclasses.replace(report, reproduce=shlex.join(["sfumato", *sys.argv[1:]]))
    report.save(options.out, options.overwrite)
    rows = [
        (f"{p.group}, {p.label}", number(p.nfe), number(p.seconds), full(p.accuracy), full(p.distance, rate=False))
        for p in report.points
    ]
    show_table(("way", "evaluations", "seconds", "asked for and there", "Fréchet distance"), rows)


def distilled_by(student: str) -> str:
    """The method that made a student, as its record says; empty where it says none."""
    from sfumato.pipeline import read_record

    made = read_record(student).get("provenance")
    recipe = made.get("recipe") if isinstance(made, dict) else None
    return recipe.removeprefix("distill ") if isinstance(recipe, str) else ""
