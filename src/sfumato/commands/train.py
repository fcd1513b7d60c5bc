"""``sfumato train RECIPE``: train a model. Killed? The same command goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.commands.verb import read
from sfumato.plan import Plan
from sfumato.progress import alone

EXAMPLE = "sfumato train {name} --data sketch --out run/"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of the verb."""

    out: Path
    """Folder of the run: checkpoints while it lasts, the trained model at the end."""
    overwrite: bool = False
    """Replace what is in the trained model's place."""


def main(args: list[str]) -> None:
    entry, recipe, options = read("train", args, Train, EXAMPLE)
    if recipe.finished(options.out, options.overwrite):
        if alone():
            print(f"finished already, with these settings: {options.out} is left as it is")
        return
    writes = [f"{options.out}/ (checkpoints, and the model at the end)"]
    if alone():
        plan = recipe.plan() if hasattr(recipe, "plan") else Plan(f"train {entry.name}", time=entry.cost)
        replace(plan, writes=writes).show()
    folder = recipe.run(options.out, overwrite=options.overwrite)
    if alone():
        print(f"trained: {folder}")
