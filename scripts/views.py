"""Scenes of slots seen by several cameras: train, draw unseen scenes, take a solid away; docs/results/NAME.md.

    python scripts/views.py --out runs/dorsal                    # killed? the same command goes on where it stopped
    python scripts/views.py --out runs/dorsal --only page

Every figure of the page is printed from ``out/figures.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data.views import SolidViews, photographs
from sfumato.files import GENERATED, contact_sheet, save_png, write_json
from sfumato.metrics.bootstrap import mean_interval
from sfumato.metrics.perceptual import PSNR
from sfumato.pipeline import load
from sfumato.pipeline.slots import Slots, edit
from sfumato.train.dorsal import Dorsal

UNSEEN = 10**6
"""Added to the seed: scenes that no model was trained on."""
FIRST = 1
"""The slot of the first solid; slot 0 is the floor."""
SHEET = 6
"""Scenes on the sheet."""
KINDS = ("drawn", "after removal", "as if nothing had gone", "another scene")
REMOVED = KINDS[1:3]


def measured(model: Any, views: range, args: argparse.Namespace) -> None:
    """All figures, written to ``out/figures.json``, and the sheet."""
    scenes = SolidViews(model.size, args.seed + UNSEEN, args.n + 1)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    rows: list[Tensor] = []
    for i in range(args.n):
        cameras, world = scenes.cameras(i).at(views), scenes.world(i)
        slots = Slots.of([scenes.objects(i)], scenes.cameras(i).poses[:1])
        drawn, rest = model.render(Slots.cat([slots, edit(slots, [FIRST])]), cameras, [i, i])
        truth, without, other = (seen(w, cameras, model.size) for w in (world, world.without(0), scenes.world(i + 1)))
        pairs = ((drawn, truth), (rest, without), (truth, without), (other, truth))
        for kind, (one, due) in zip(KINDS, pairs, strict=True):
            # A solid that a camera does not see leaves its picture as it was, and there is nothing to be judged.
            seeing = (truth != without).flatten(1).any(1) | (kind not in REMOVED)
            if seeing.any():
                found[kind].append(float(PSNR()(one[seeing], due[seeing]).mean()))
        if i < SHEET:
            rows.append(torch.cat([truth, drawn, rest, without]))
    record = {"PSNR": found, "sha256": model.describe()["sha256"], "views": len(views), "n": args.n}
    write_json(args.out / "figures.json", record, overwrite=True)
    args.docs.mkdir(parents=True, exist_ok=True)
    pictures = (torch.cat(rows).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    said = {"Source": GENERATED, "model": "dorsal", "sha256": record["sha256"]}
    sheet = contact_sheet(pictures, 4 * len(views), gap=2, side=2 * model.size)
    save_png(args.docs / f"{args.name}.png", sheet, said, overwrite=True)


def seen(world: Any, cameras: Any, side: int) -> Float[Tensor, "view 3 side side"]:
    """The true pictures of a world, in [0, 1]."""
    return torch.from_numpy(photographs(world, cameras, side)).permute(0, 3, 1, 2).float() / 255


def page(record: dict[str, Any], training: Dorsal, args: argparse.Namespace) -> str:
    """The page of these figures."""
    told = {
        "drawn": "views that it draws, against the true ones",
        "after removal": "views that it draws after a slot was removed, against the true ones without that solid",
        "as if nothing had gone": "for comparison: the true views with the solid, against those without",
        "another scene": "for comparison: the true views of another scene",
    }
    rows = []
    for kind in KINDS:
        values = record["PSNR"][kind]
        mean = mean_interval(torch.tensor(values), torch.Generator().manual_seed(0))
        rows.append(f"| {told[kind]} | {mean.value:.1f} [{mean.low:.1f}, {mean.high:.1f}] | {len(values)} |")
    return "\n".join([
        f"# {args.name}: slots, drawn from several cameras",
        "",
        f"`Dorsal(**Dorsal.presets['{args.preset}'])` on the world of solids: {training.updates} updates of "
        f"{training.batch} scenes, {record['views']} views of {training.size} px of each drawn together. "
        "`scripts/views.py` trained it and made this page. A small model after a short training, to be read against "
        "the rows for comparison.",
        "",
        "| | PSNR in dB [95 %] | scenes |",
        "| --- | --- | --- |",
        *rows,
        "",
        "Scenes that the model has not seen; the mean over a scene's views, then over scenes. In the rows with a "
        "removed solid only views count in which it is seen.",
        "",
        f"A row for each of the first scenes, not selected, {record['views']} views each: the true ones; drawn; drawn "
        "without the first solid's slot, the same seed; the true ones without it.",
        "",
        f"![views]({args.name}.png)",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dorsal"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="dorsal", help="of the page")
    parser.add_argument("--preset", default="tiny", choices=sorted(Dorsal.presets))
    parser.add_argument("--updates", type=int, help="by default the preset's")
    parser.add_argument("--n", type=int, default=64, help="scenes drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the unseen scenes")
    parser.add_argument("--only", choices=("train", "page"))
    args = parser.parse_args()
    training = Dorsal(**{**Dorsal.presets[args.preset], **({"updates": args.updates} if args.updates else {})})
    if args.only != "page":
        training.run(args.out / "train")
    if args.only != "train":
        kept = args.out / "figures.json"
        if args.only is None or not kept.exists():
            measured(load(str(args.out / "train" / "model")), range(1, 1 + training.views), args)
        record = json.loads(kept.read_text())
        (args.docs / f"{args.name}.md").write_text(page(record, training, args), encoding="utf-8")


if __name__ == "__main__":
    main()
