"""What a run will cost, said before it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfumato.text import visible


@dataclass(frozen=True)
class Plan:
    """The costs of a run: what is known is stated, what is not is left out.

    Attributes:
        title: what will run, in one line.
        memory: bytes by part, e.g. ``weights``, ``gradients``, ``optimiser``, ``activations`` (an estimate).
        seconds: the expected wall time, or None.
        time: the time in words where seconds cannot be told beforehand, e.g. the cost in the catalogue.
        writes: the files and folders that will be there at the end.
    """

    title: str
    memory: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    time: str = ""
    writes: Sequence[str] = ()

    def lines(self) -> list[tuple[str, str]]:
        """(label, text) pairs, in the order in which they are shown."""
        shown = [(f"memory: {part}", human_bytes(size)) for part, size in self.memory.items()]
        if len(self.memory) > 1:
            shown.append(("memory: in all", human_bytes(sum(self.memory.values()))))
        if self.seconds is not None:
            shown.append(("time", f"about {human_time(self.seconds)}"))
        elif self.time:
            shown.append(("time", self.time))
        return shown + [("writes", path) for path in self.writes]

    def show(self) -> None:
        """Print the plan on stderr, where progress goes too."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_row(Text("plan", "bold"), Text(visible(self.title)))
        for label, text in self.lines():
            table.add_row(Text(visible(label), "dim"), Text(visible(text)))
        Console(file=sys.stderr, highlight=False).print(table)


def weights_of(parts: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the weights of each of a model's networks, in the precision that they have."""
    sizes = {name: sum(p.numel() * p.element_size() for p in part.parameters()) for name, part in parts.items()}
    return {f"weights of {name}": size for name, size in sizes.items() if size}


def human_bytes(size: float) -> str:
    """Decimal units, as disks and model pages give them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # what would be rounded to 1000 is one of the next unit
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def human_time(seconds: float) -> str:
    """Seconds below two minutes, then minutes, then hours."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def makespan(seconds: Sequence[float], jobs: int) -> float:
    """Wall time of pieces of work, each begun in order as soon as one of ``jobs`` workers is free."""
    free = [0.0] * jobs
    for spent in seconds:
        free[free.index(min(free))] += spent
    return max(free)
