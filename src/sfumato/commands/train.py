"""``sfumato train RECIPE``: train a model. Killed? The same command goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfumato.commands.verb import read, trained
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
    folder = trained(*read("train", args, Train, EXAMPLE), "checkpoints, and the model at the end")
    if folder and alone():
        print(f"trained: {folder}")
