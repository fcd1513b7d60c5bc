"""Instructions of text and pictures: train one model of several tasks, draw for unseen rows; docs/results/NAME.md.

    python scripts/instructions.py --out runs/omnigen            # killed? the same command goes on where it stopped
    python scripts/instructions.py --out runs/omnigen --only page

Every figure of the page is printed from ``out/figures.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sfumato.data.instructions import SketchInstructions
from sfumato.data.pictures import to_tensor
from sfumato.files import GENERATED, contact_sheet, save_png, write_json
from sfumato.metrics.bootstrap import mean_interval
from sfumato.pipeline import Instruction, load
from sfumato.train.omnigen import TrainOmniGen

UNSEEN = 10**6
"""Added to the seed of the sketch world, so that its rows are none that the model learned from."""
SHEET = 6
"""Rows of each task on the sheet."""
SETS = ("drawn", "what the autoencoder allows", "what is due for another row")
"""The pictures that are held against what is due."""


def measured(model: Any, training: TrainOmniGen, args: argparse.Namespace) -> None:
    """All figures, written to ``out/figures.json``, and the sheet."""
    found, shown = {}, []
    for task in training.tasks:
        fresh = SketchInstructions(training.size, args.seed + UNSEEN, args.n, (task,))
        rows = [fresh.row(i) for i in range(args.n)]
        inputs = [[fresh.picture(name) for name in row.inputs] for row in rows]
        asked = [Instruction(row.text, tuple(given)) for row, given in zip(rows, inputs, strict=True)]
        due = to_tensor([fresh.picture(row.output) for row in rows]) / 2 + 0.5
        drawn = model.draw(asked, range(args.n), progress=True)
        other = [(i + 1) % args.n for i in range(args.n)]
        with torch.no_grad():
            latents = model.encode_image(due * 2 - 1)
            best = (model.decode_latents(latents) / 2 + 0.5).clamp(0, 1)
        sets = dict(zip(SETS, (drawn, best, due[other]), strict=True))
        found[task] = {name: (x - due).square().flatten(1).mean(1).tolist() for name, x in sets.items()}
        for i in range(SHEET):
            given = to_tensor(inputs[i][:1]) / 2 + 0.5 if inputs[i] else torch.ones_like(due[:1])
            shown.append(torch.cat([given, drawn[i : i + 1], due[i : i + 1]]))
    record = {"error": found, "sha256": model.describe()["sha256"], "n": args.n}
    write_json(args.out / "figures.json", record, overwrite=True)
    args.docs.mkdir(parents=True, exist_ok=True)
    pictures = (torch.cat(shown).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    said = {"Source": GENERATED, "model": "omnigen", "sha256": record["sha256"]}
    sheet = contact_sheet(pictures, 3 * SHEET // 2, gap=2, side=2 * training.size)
    save_png(args.docs / f"{args.name}.png", sheet, said, overwrite=True)


def page(record: dict[str, Any], training: TrainOmniGen, args: argparse.Namespace) -> str:
    """The page of these figures."""
    rows = []
    for task in training.tasks:
        for name in SETS:
            told = mean_interval(torch.tensor(record["error"][task][name]), torch.Generator().manual_seed(0))
            rows.append(f"| {task} | {name} | {told.value:.4f} [{told.low:.4f}, {told.high:.4f}] |")
    return "\n".join([
        f"# {args.name}: instructions of text and pictures",
        "",
        f"`TrainOmniGen(**TrainOmniGen.presets['{args.preset}'])` on the sketch world: {training.updates} updates of "
        f"{training.batch} rows, pictures of {training.size} px. `scripts/instructions.py` trained it and made this "
        "page. A small model after a short training, to be read against the rows for comparison.",
        "",
        "| task | picture | mean squared error [95 %] |",
        "| --- | --- | --- |",
        *rows,
        "",
        f"{record['n']} rows of each task that the model has not seen, pictures in [0, 1], against what is due. What "
        "the autoencoder allows is what is due, encoded and decoded.",
        "",
        f"Threes of what is given, what is drawn, what is due: the first {SHEET} rows of each task, not selected.",
        "",
        f"![instructions]({args.name}.png)",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/omnigen"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="omnigen", help="of the page")
    parser.add_argument("--preset", default="tiny-sketch", choices=("small-sketch", "tiny-sketch"))
    parser.add_argument("--updates", type=int, help="by default the preset's")
    parser.add_argument("--n", type=int, default=96, help="rows drawn of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the unseen rows")
    parser.add_argument("--only", choices=("train", "page"))
    args = parser.parse_args()
    changes = {"updates": args.updates} if args.updates else {}
    training = TrainOmniGen(**{**TrainOmniGen.presets[args.preset], **changes})
    if args.only != "page":
        training.run(args.out / "train")
    if args.only != "train":
        kept = args.out / "figures.json"
        if args.only is None or not kept.exists():
            measured(load(str(args.out / "train" / "model")), training, args)
        record = json.loads(kept.read_text())
        (args.docs / f"{args.name}.md").write_text(page(record, training, args), encoding="utf-8")


if __name__ == "__main__":
    main()
