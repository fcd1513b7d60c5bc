"""Tables on the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from sfumato.text import visible


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print rows on stdout, wrapped to the terminal's width or to COLUMNS; in a pipe without it, one line a row.

    No cell is markup.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    above = Text(visible(title)) if title else None
    table = Table(*header, title=above, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(Text(visible(str(cell))) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = 1000
    console.print(table)
