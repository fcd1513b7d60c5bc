"""``sfumato choose VERB``: which method for which purpose."""

from __future__ import annotations

from sfumato import catalog
from sfumato.commands.tables import show_table
from sfumato.commands.words import unmarked
from sfumato.errors import BadInput, unknown

HELP = """usage: sfumato choose VERB

Example: sfumato choose erase

When to use which method of a verb, what it costs and what to beware of. Verbs: {verbs}.
"""


def main(args: list[str]) -> int:
    verbs = catalog.verbs()
    if {"-h", "--help"} & set(args):
        print(HELP.format(verbs=", ".join(verbs)), end="")
        return 0
    if len(args) != 1:
        raise BadInput(f"name one verb out of {', '.join(verbs)}, as in `sfumato choose erase`")
    if args[0] not in verbs:
        raise unknown("verb", args[0], verbs)
    rows = [(m.name, *map(unmarked, (m.when, m.cost, m.beware))) for m in catalog.methods(args[0])]
    show_table(("method", "use it for", "cost", "beware"), rows)
    if args[0] == "erase":
        from sfumato.commands import choosing

        show_table(choosing.HEADER, choosing.table())
        print("\n".join(choosing.advice()))
    ledgers = list(dict.fromkeys(m.ledger for m in catalog.methods(args[0]) if m.ledger))
    if ledgers:
        print(f"Measured claims: sfumato ledger NAME, for {', '.join(ledgers)}.")
    return 0
