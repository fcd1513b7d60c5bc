"""``sfumato classify METHOD``: train a classifier. Killed? The same command goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfumato.commands.verb import read, trained
from sfumato.foreign import read_json
from sfumato.progress import alone

EXAMPLE = "sfumato classify {name} --data pictures/ --out run/"


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Options of the verb."""

    out: Path
    """Folder of the run: checkpoints while it lasts, the trained classifier in OUT/model at the end."""
    overwrite: bool = False
    """Replace what is in the classifier's place."""


def main(args: list[str]) -> None:
    asked = read("classify", args, Classify, EXAMPLE)
    folder = trained(*asked, "checkpoints, and the classifier in model/ at the end")
    if folder is None or not alone():
        return
    card = read_json(folder / "card.json", {"top1": dict})
    right = card["top1"]
    told = "" if right["low"] is None else f" [{right['low']:.3f}, {right['high']:.3f}]"
    print(f"right: {right['value']:.3f}{told} of {right['n']}, {card['measured_on']}")
    print(f"trained: {folder}, for `sfumato audit --detector` and `sfumato score --extractor`")
