"""``sfumato train RECIPE``: train a model. Killed? The same command goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.commands.verb import alone, read
from sfumato.plan import Plan

EXAMPLE = "sfumato train {name} --data sketch --out run/"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of the verb."""

    out: Path
    """Folder of the run: checkpoints while it lasts, the trained pipeline at the end."""


def main(args: list[str]) -> None:
    entry, recipe, options = read("train", args, Train, EXAMPLE)
    writes = [f"{options.out}/ (checkpoints, and the pipeline at the end)"]
    if alone():
        plan = recipe.plan() if hasattr(recipe, "plan") else Plan(f"train {entry.name}", time=entry.cost)
        replace(plan, writes=writes).show()
    folder = recipe.run(options.out)
    if alone():
        print(f"trained: {folder}")
