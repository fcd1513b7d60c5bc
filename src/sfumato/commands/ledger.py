"""``sfumato ledger``: re-measure a method's central claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from sfumato import catalog
from sfumato.commands.options import parse
from sfumato.errors import BadInput, unknown

EXAMPLE = "sfumato ledger rece"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Options of the command."""

    name: Annotated[str | None, Positional] = None
    """The entry, which is named after its method."""
    table: bool = False
    """Show the results of all entries instead, and measure nothing."""


def main(args: list[str]) -> None:
    names = list(dict.fromkeys(m.ledger for m in catalog.METHODS if m.ledger))
    about = f"Example: {EXAMPLE}\n\nEntries: {', '.join(names)}. Each takes minutes and says so first."
    options = Ledger(**parse("sfumato ledger", args, Ledger, about=about)[0])
    from sfumato import ledger

    if options.table:
        print(ledger.table())
    elif options.name is None:
        raise BadInput(f"name an entry ({', '.join(names)}), or add --table to see all results")
    elif options.name not in names:
        raise unknown("ledger entry", options.name, names)
    else:
        print(ledger.run(options.name))
