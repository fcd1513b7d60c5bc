"""``sfumato methods``: the catalogue."""

from __future__ import annotations

import json

from sfumato.catalog import METHODS
from sfumato.commands.tables import show_table
from sfumato.errors import unknown

HELP = """usage: sfumato methods [--json]

Example: sfumato methods

Every method: verb, name, paper, cost and one line. --json prints a list of objects instead.
"""


def main(args: list[str]) -> int:
    for arg in args:
        if arg not in ("-h", "--help", "--json"):
            raise unknown("option of sfumato methods", arg, ["--json", "--help"])
    if "-h" in args or "--help" in args:
        print(HELP, end="")
    elif "--json" in args:
        print(json.dumps([method.as_dict() for method in METHODS], indent=2, ensure_ascii=False))
    else:
        rows = [(m.verb, m.name, m.paper.arxiv, m.cost, m.summary) for m in METHODS]
        show_table(("verb", "name", "arXiv", "cost", "what it does"), rows)
    return 0
