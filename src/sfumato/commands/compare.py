"""``sfumato compare``: two audits side by side, where both were measured in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from sfumato.commands.options import parse
from sfumato.commands.tables import show_table
from sfumato.errors import BadInput
from sfumato.files import refuse_existing

EXAMPLE = "sfumato compare report-uce/ report-rece/ --out comparison/"


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Options of the command."""

    reports: Annotated[tuple[Path, ...], Positional]
    """Two folders written by `sfumato audit`."""
    out: Path
    """Folder for the page (index.html)."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\nRefused where the protocols differ; the message names the fields."
    options = Compare(**parse("sfumato compare", args, Compare, about=about)[0])
    if len(options.reports) != 2:
        raise BadInput(f"name two reports, as in `{EXAMPLE}`")
    refuse_existing(options.out, options.overwrite)
    from sfumato.report import compare
    from sfumato.report.schema import AuditReport
    from sfumato.report.words import full

    first, second = map(AuditReport.load, options.reports)
    rows = [
        (f"{r.group}: {r.label}", full(r.first, rate=r.rate), full(r.second, rate=r.rate))
        for r in compare.rows(first, second)
    ]
    compare.save(first, second, options.out, options.overwrite)
    show_table(("95 % intervals", *map(str, options.reports)), rows)
    print(f"open {options.out / 'index.html'}")
