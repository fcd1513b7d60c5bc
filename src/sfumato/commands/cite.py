"""``sfumato cite METHOD``: what to cite."""

from __future__ import annotations

from sfumato import catalog
from sfumato.errors import BadInput

HELP = """usage: sfumato cite METHOD

Example: sfumato cite rece

The BibTeX of exactly what the method runs: its own paper, and those of the methods it builds on. "sfumato cite audit"
prints what an audit measures by.
"""


def main(args: list[str]) -> int:
    if {"-h", "--help"} & set(args):
        print(HELP, end="")
        return 0
    if len(args) != 1:
        raise BadInput("name one method, as in `sfumato cite rece`")
    print("\n\n".join(paper.bibtex for paper in catalog.cite(args[0])))
    return 0
