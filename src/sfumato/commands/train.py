"""``sfumato train RECIPE``: train a model. Killed? The same command goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfumato.commands.verb import read

EXAMPLE = "sfumato train {name} --data sketch --out run/"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of the verb."""

    out: Path
    """Folder of the run: checkpoints while it lasts, the trained pipeline at the end."""


def main(args: list[str]) -> None:
    _, recipe, options = read("train", args, Train, EXAMPLE)
    recipe.run(options.out)
    print(f"trained: {options.out}")
