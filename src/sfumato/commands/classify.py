"""``sfumato classify METHOD``: train a classifier. Killed? The same command goes on where it stopped."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from sfumato.commands.verb import read, trained
from sfumato.foreign import read_json
from sfumato.progress import alone

EXAMPLE = "sfumato classify {name} --data pictures/ --out run/"


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Options of the verb."""

    out: Path
    """Folder of the run: checkpoints while it lasts, the trained classifier in OUT/model at the end, and a page where
    the method has pictures to show."""
    overwrite: bool = False
    """Replace what is in the classifier's place."""


def main(args: list[str]) -> None:
    entry, method, options = read("classify", args, Classify, EXAMPLE)
    folder = trained(entry, method, options, "checkpoints, and the classifier in model/ at the end")
    if not alone():
        return
    model, page = options.out / "model", options.out / "index.html"
    card = read_json(model / "card.json", {"top1": dict})
    if folder is not None:
        right = card["top1"]
        told = "" if right["low"] is None else f" [{right['low']:.3f}, {right['high']:.3f}]"
        print(f"right: {right['value']:.3f}{told} of {right['n']}, {card['measured_on']}")
        print(f"trained: {folder}, for `sfumato audit --detector` and `sfumato score --extractor`")
    if (folder is not None or not page.exists()) and (sheets := method.sheets(model)):
        from sfumato.report.classifier import ClassifierReport

        command = shlex.join(["sfumato", *sys.argv[1:]])
        ClassifierReport(entry.name, asdict(method), card, sheets, command).write(options.out)
        print(f"page: {page}")
