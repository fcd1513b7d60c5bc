"""``sfumato distill METHOD``: from many sampling steps to few. Killed? The same command goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.commands.options import STEPS
from sfumato.commands.verb import read

EXAMPLE = "sfumato distill {name} --teacher sketch --steps 4 --out student/"


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Options of the verb."""

    teacher: str = "sketch"
    """An embedded model, a folder written by save_pretrained or by `sfumato train`, or a hub id."""
    out: Path
    """Folder of the run: checkpoints while it lasts, the student in model/ at the end."""


def main(args: list[str]) -> None:
    _, method, options = read("distill", args, Distill, EXAMPLE, STEPS)
    writes = [f"{options.out}/ (checkpoints, and the student in model/ at the end)"]
    replace(method.plan(), writes=writes).show()
    print(f"distilled: {method.run(options.out)}")
