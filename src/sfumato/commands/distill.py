"""``sfumato distill METHOD``: from many sampling steps to few. Killed? The same command goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.commands.options import STEPS
from sfumato.commands.verb import read
from sfumato.progress import alone

EXAMPLE = "sfumato distill {name} --teacher sketch --out student/"


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Options of the verb."""

    teacher: str = "sketch"
    """An embedded model, a folder written by save_pretrained or by `sfumato train`, or a hub id."""
    out: Path
    """Folder of the run: checkpoints while it lasts, the student in model/ at the end."""
    overwrite: bool = False
    """Replace what is in the student's place."""


def main(args: list[str]) -> None:
    _, method, options = read("distill", args, Distill, EXAMPLE, STEPS)
    if method.finished(options.out, options.overwrite):
        if alone():
            print(f"finished already, with these settings: {options.out} is left as it is")
        return
    writes = [f"{options.out}/ (checkpoints, and the student in model/ at the end)"]
    if alone():
        replace(method.plan(), writes=writes).show()
    folder = method.run(options.out, overwrite=options.overwrite)
    if alone():
        print(f"distilled: {folder}")
