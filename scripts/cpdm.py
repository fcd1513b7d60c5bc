"""Classes that come task by task: `sfumato train cpdm` and what plain replay makes of them, and docs/results/NAME.md.

    python scripts/cpdm.py --data digits --preset small-digits --out runs/cpdm-digits
    python scripts/cpdm.py --data cifar10/train.parquet --test cifar10/test.parquet --out runs/cpdm-cifar10

Killed? The same command goes on where it stopped. Every figure of the page is read from files under ``--out``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sfumato.files import GENERATED, contact_sheet, save_png
from sfumato.pipeline import load
from sfumato.train.cpdm import CPDM

ARMS: dict[str, dict[str, Any]] = {
    "cpdm": {},
    "plain replay": {"prototype": "none", "protect": (), "tau": 0.0},
    "no replay": {"prototype": "none", "protect": (), "tau": 0.0, "replay": 0},
}
EACH = 12
"""Pictures shown of each class."""


def recipe(args: argparse.Namespace, arm: str) -> CPDM:
    """The preset, with what the command line says and what the arm leaves out."""
    changes = {k: getattr(args, k) for k in ("updates", "test") if getattr(args, k)}
    return CPDM(**{**CPDM.presets[args.preset], "data": args.data, **changes, **ARMS[arm]})


def table(found: dict[str, Any]) -> list[str]:
    """The accuracy matrix: a row after each task, a column for each task's classes."""
    tasks = [", ".join(task) for task in found["tasks"]]
    rows = [[f"{x:.1%}" for x in row] + [""] * (len(tasks) - len(row)) for row in found["matrix"]]
    totals = zip(*(found[key] for key in ("average_accuracy", "weighted_accuracy", "forgetting")), strict=True)
    return [
        "| after | " + " | ".join(tasks) + " | average | by classes | forgetting |",
        "| --- |" + " --- |" * (len(tasks) + 3),
        *(
            f"| task {i} | " + " | ".join([*row, *(f"{x:.1%}" for x in total)]) + " |"
            for i, (row, total) in enumerate(zip(rows, totals, strict=True), 1)
        ),
    ]


def page(args: argparse.Namespace) -> None:
    """The matrices of all arms, and a sheet of what the last model of each draws: one row a class, prototypes first."""
    name = args.out.name
    args.docs.mkdir(parents=True, exist_ok=True)
    settings = recipe(args, "cpdm")
    lines = [
        f"# {name}: classes that come task by task",
        "",
        f"`CPDM(**CPDM.presets['{args.preset}'])` on `{Path(args.data).name}`: {settings.updates} updates of "
        f"{settings.batch} pictures of {settings.size} px a task, {settings.replay} pictures of replay a class. "
        "`scripts/cpdm.py` trained it and made this page. One seed: see the ledger for intervals.",
        "",
    ]
    for arm in ARMS:
        folder = args.out / arm.replace(" ", "-")
        found = json.loads((folder / "accuracy.json").read_text())
        model: Any = load(str(folder))
        drawn = model.sample(list(model.labels), EACH, batch=64).unflatten(0, (-1, EACH))
        shown = (folder / "prototypes.safetensors").is_file()
        if shown:
            first = torch.stack(list(model.prototypes().values())) / 2 + 0.5
            drawn = torch.cat([first.clamp(0, 1)[:, None], drawn], dim=1)
        pictures = (drawn.flatten(0, 1).permute(0, 2, 3, 1) * 255).round().byte().numpy()
        file = f"{name}-{arm.replace(' ', '-')}.png"
        sheet = contact_sheet(pictures, EACH + shown, gap=2, side=48)
        save_png(args.docs / file, sheet, {"Source": GENERATED, "model": name}, overwrite=True)
        after = " after its prototype" if shown else ""
        lines += [f"## {arm}", "", *table(found), "", f"Accuracy is of {found['measured_on']}.",
                  f"One row a class ({', '.join(model.labels)}){after}, the first seeds of each, not selected:", "",
                  f"![{arm}]({file})", ""]  # fmt: skip
    (args.docs / f"{name}.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help='Parquet with image, label (and name); or "digits"')
    parser.add_argument("--test", help="the same for pictures that the models are not trained on")
    parser.add_argument("--preset", default="small-cifar10", choices=sorted(CPDM.presets))
    parser.add_argument("--out", type=Path, default=Path("runs/cpdm-cifar10"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--updates", type=int, help="in each task; by default the preset's")
    parser.add_argument("--only", choices=("train", "page"))
    args = parser.parse_args()
    if args.only != "page":
        for arm in ARMS:
            recipe(args, arm).run(args.out / arm.replace(" ", "-"))
    if args.only != "train":
        page(args)


if __name__ == "__main__":
    main()
