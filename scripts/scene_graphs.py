"""Pictures from scene graphs, end to end: train, draw unseen graphs, read what was drawn, write docs/results/.

    python scripts/scene_graphs.py --out runs/trf-sg2im          # killed? the same command goes on where it stopped
    python scripts/scene_graphs.py --out runs/trf-sg2im --only page

Stages: train (`sfumato train trf-sg2im` with a preset, on the sketch world), page (``docs/results/trf-sg2im.md`` with a
sheet: graph, layout, pictures). Relations are read twice, from the layout's boxes and by the scene oracle from the
pictures, of graphs that the model has not seen and of the same graphs turned round. Every figure is printed from
``out/figures.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.commands.graph import drawn as board
from sfumato.data import scenes
from sfumato.data.graphs import SceneGraph, open_graphs, spatial_relation
from sfumato.data.pictures import to_tensor
from sfumato.files import GENERATED, contact_sheet, save_png, write_json
from sfumato.metrics.bootstrap import wilson
from sfumato.pipeline import GraphModel, load
from sfumato.train.trf_sg2im import TrfSG2Im

FRESH = 10**6
"""Added to the seed of the sketch world, so that its graphs are none that the model learned from."""
TURNED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SHEET, SEEDS = 8, 4
"""Graphs on the sheet, and pictures of each."""


def unseen(size: int, n: int, seed: int) -> tuple[Any, list[int]]:
    """Pictures with graphs, and rows of ``n`` that name a relation which can be turned round."""
    world = open_graphs("sketch", size, FRESH + seed, 40 * n)
    able = lambda i: bool(world.graph(i).relationships) and all(r in TURNED for _, r, _ in world.graph(i).relationships)
    return world, list(islice(filter(able, range(len(world))), n))


def turned(graph: SceneGraph) -> SceneGraph:
    """The same objects with every relation turned round."""
    return replace(graph, relationships=tuple((a, TURNED[word], b) for a, word, b in graph.relationships))


def in_layout(graph: SceneGraph, boxes: Sequence[Sequence[float]]) -> list[bool]:
    """For each relation of a graph, whether the boxes stand so."""
    return [spatial_relation(boxes[a], boxes[b]) == word for a, word, b in graph.relationships]


def in_picture(graph: SceneGraph, found: Sequence[scenes.Found]) -> dict[str, list[bool]]:
    """For each object whether the oracle finds it, in its colour; for each relation whether what it finds stands so,
    and (of relations between two colours) whether what it finds of these colours does, whatever it takes it for."""
    at = {f"{f.colour} {f.object}": f for f in reversed(found)}
    coloured = {f.colour: f for f in reversed(found)}
    seen = [at.get(name) for name in graph.objects]
    colours = [name.split()[0] for name in graph.objects]
    stand: dict[str, list[bool]] = {"objects": [one is not None for one in seen], "relations": [], "colours": []}
    for a, word, b in graph.relationships:
        ways = {"relations": (seen[a], seen[b])}
        if colours[a] != colours[b]:
            ways["colours"] = coloured.get(colours[a]), coloured.get(colours[b])
        for way, (first, second) in ways.items():
            stand[way].append(first is not None and second is not None and scenes.holds(first, word, second))
    return stand


def read(graphs: Sequence[SceneGraph], pictures: Tensor) -> dict[str, list[bool]]:
    """What the oracle makes of pictures of these graphs."""
    found = [each for part in pictures.split(64) for each in scenes.load().read(part)]
    told = [in_picture(graph, each) for graph, each in zip(graphs, found, strict=True)]
    return {way: [x for each in told for x in each[way]] for way in ("objects", "relations", "colours")}


def measured(model: GraphModel, args: argparse.Namespace) -> dict[str, Any]:
    """All figures, written to ``out/figures.json``, and the sheet."""
    world, rows = unseen(model.size, args.n, args.seed)
    graphs = [replace(world.graph(i), boxes=None) for i in rows]
    seeds, found = list(range(len(rows))), {}
    for name, asked in (("as asked", graphs), ("turned round", [turned(g) for g in graphs])):
        layouts = model.layouts(asked, seeds)
        right = [x for g, at in zip(asked, layouts, strict=True) for x in in_layout(g, at.boxes)]
        found[name] = {"layout": right, **read(asked, model.draw(asked, seeds, progress=True))}
    real = to_tensor([world.picture(i) for i in rows])
    with torch.no_grad():
        again = torch.cat([model.decode_latents(model.encode_image(x)) for x in real.split(64)])
    for name, x in (("real pictures, encoded and decoded", again), ("real pictures", real)):
        found[name] = read(graphs, ((x + 1) / 2).clamp(0, 1))
    kept = {name: {k: [sum(v), len(v)] for k, v in part.items()} for name, part in found.items()}
    first, second = (model.draw(graphs[:32], [s + i for i in seeds[:32]]) for s in (0, FRESH))
    record = {
        "found": kept, "graphs": len(graphs), "apart": float((first - second).abs().mean()),
        "sha256": model.describe()["sha256"], "seed": args.seed,
        "parameters": sum(p.numel() for part in model.parts().values() for p in part.parameters()),
    }  # fmt: skip
    write_json(args.out / "figures.json", record, overwrite=True)
    args.docs.mkdir(parents=True, exist_ok=True)
    said = {"Source": GENERATED, "model": "trf-sg2im", "sha256": record["sha256"]}
    save_png(args.docs / f"{args.name}.png", sheet(model, graphs[:SHEET]), said, overwrite=True)
    (args.out / "asked.json").write_text(json.dumps([in_words(g) for g in graphs[:SHEET]]), encoding="utf-8")
    return record


def sheet(model: GraphModel, graphs: Sequence[SceneGraph]) -> np.ndarray:
    """A row for each graph: a layout, and pictures of several seeds, the first of them of that layout."""
    rows = []
    for graph in graphs:
        x = model.draw(graph, range(SEEDS))
        enlarged = torch.nn.functional.interpolate(x, (128, 128)).permute(0, 2, 3, 1)
        rows += [board(model.layouts(graph, 0)[0], 128), *(enlarged.numpy() * 255).round().astype(np.uint8)]
    return contact_sheet(np.stack(rows), SEEDS + 1)


def in_words(graph: SceneGraph) -> str:
    return "; ".join(f"{graph.objects[a]} {word} {graph.objects[b]}" for a, word, b in graph.relationships)


def page(record: dict[str, Any], asked: Sequence[str], training: TrfSG2Im, args: argparse.Namespace) -> str:
    """The page of these figures."""
    share = lambda pair: "" if pair is None else "{:.1%} [{:.1%}, {:.1%}]".format(pair[0] / pair[1], *wilson(*pair))
    columns = {
        "layout": "relations in the layout", "relations": "relations in the picture",
        "colours": "relations of colours in the picture", "objects": "objects in the picture",
    }  # fmt: skip
    rows = [
        f"| {name} | " + " | ".join(share(part.get(column)) for column in columns) + " |"
        for name, part in record["found"].items()
    ]
    return "\n".join([
        f"# {args.name}: pictures from scene graphs",
        "",
        f"`TrfSG2Im(**TrfSG2Im.presets['{args.preset}'])` on the sketch world: {record['parameters']:,} parameters, "
        f"{training.code_updates} updates of the autoencoder, {training.layout_updates} of layouts and "
        f"{training.updates} of both transformers. `scripts/scene_graphs.py` trained it and made this page.",
        "",
        "| right [95 %] | " + " | ".join(columns.values()) + " |",
        "| --- |" + " --- |" * len(columns),
        *rows,
        "",
        f"{record['graphs']} graphs that the model has not seen, one picture each. In pictures objects and relations "
        "are read by the scene oracle; an object counts where it has its kind and its colour, and \"of colours\" "
        "(relations between two colours only) where it has its colour, whatever it looks like. \"Turned round\" are "
        "the same graphs and seeds with left and right, above and below exchanged. Two pictures of a graph differ by "
        f"{record['apart']:.3f} of the range of a pixel on average.",
        "",
        "A layout, and four pictures of the first four seeds, not selected:",
        "",
        *(f"{i}. {words}" for i, words in enumerate(asked, 1)),
        "",
        f"![layouts and pictures]({args.name}.png)",
        "",
    ])  # fmt: skip


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trf-sg2im"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="trf-sg2im", help="of the page")
    parser.add_argument("--preset", default="small-sketch", choices=sorted(TrfSG2Im.presets))
    parser.add_argument("--updates", type=int, help="by default the preset's")
    parser.add_argument("--n", type=int, default=500, help="graphs drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the unseen graphs")
    parser.add_argument("--only", choices=("train", "page"))
    args = parser.parse_args(given)
    changes = {"data": "sketch", "checkpoint_every": 200} | ({"updates": args.updates} if args.updates else {})
    training = TrfSG2Im(**{**TrfSG2Im.presets[args.preset], **changes})
    if args.only in (None, "train"):
        training.run(args.out / "train")
    if args.only in (None, "page"):
        model: Any = load(str(args.out / "train" / "model"))
        measured(model, args)
        record, asked = (json.loads((args.out / name).read_text()) for name in ("figures.json", "asked.json"))
        text = page(record, asked, training, args)
        (args.docs / f"{args.name}.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
