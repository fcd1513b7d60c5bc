"""``sfumato ledger``: re-measure a method's central claim."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from sfumato.commands.options import parse
from sfumato.commands.tables import show_table
from sfumato.errors import BadInput, unknown
from sfumato.fields import Count
from sfumato.plan import human_time

EXAMPLE = "sfumato ledger rece"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Options of the command."""

    name: Annotated[str | None, Positional] = None
    """The entry, which is named after its method."""
    table: bool = False
    """Print the page of all results, in Markdown, and measure nothing."""
    folder: Path | None = None
    """Where the results are kept, ledger/ unless told otherwise; measuring again replaces an entry's. --table shows the
    package's own by default."""
    jobs: Count = 2
    """How many seeds or arms are measured at a time, in processes of one thread each; figures do not depend on it."""


def main(args: list[str]) -> None:
    from sfumato.ledger.core import RECORDS
    from sfumato.ledger.core import names as entries

    names = entries()
    about = (
        f"Example: {EXAMPLE}\n\nEntries: {', '.join(names)}. Each takes minutes and says so first. Killed? The same "
        "command goes on where it stopped."
    )
    options = Ledger(**parse("sfumato ledger", args, Ledger, about=about)[0])
    if options.name is None and not options.table:
        raise BadInput(f"name an entry ({', '.join(names)}), or add --table to see all results")
    if options.name is not None and options.name not in names:
        raise unknown("ledger entry", options.name, names)
    from sfumato import ledger

    if options.table:
        print(ledger.table(options.folder or RECORDS))
        return
    folder = options.folder or Path("ledger")
    record = ledger.run(options.name, folder, options.jobs)
    rows = []
    for claim in record["claims"].values():
        effect = "{value:+.3g} [{low:+.3g}, {high:+.3g}]".format(**claim["effect"])
        rows.append((ledger.said(claim), effect, claim["sentence"]))
    show_table(("verdict", "effect, 95 % interval", "claim"), rows)
    if any(ledger.DAGGER in row[0] for row in rows):
        print(f"{ledger.DAGGER}: {ledger.FEW}")
    print(f"{human_time(record['seconds'])}; written to {folder / options.name}.json")
