"""``sfumato graph``: layouts and pictures of scene graphs in JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional

from sfumato.commands.options import parse
from sfumato.commands.sample import read_seeds, seed_alias
from sfumato.commands.verb import Where, load_any
from sfumato.errors import BadInput
from sfumato.fields import Count, Share, Temperature
from sfumato.files import GENERATED, atomic_folder, contact_sheet, refuse_existing, save_png, write_json
from sfumato.plan import Plan
from sfumato.text import counted

if TYPE_CHECKING:
    from sfumato.data.graphs import SceneGraph
    from sfumato.pipeline.graphs import Layout

EXAMPLE = "sfumato graph scene.json --model run/model --seeds 0-3 --out pictures/"
SIDE = 256
"""Of a drawn layout, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Graph(Where):
    """Options of the command."""

    graphs: Annotated[tuple[Path, ...], Positional]
    """Files of scene graphs, {"objects": ["red star", "blue fish"], "relationships": [[0, "left of", 1]]}, one or a
    list of them in each; one row of the contact sheets each. With "boxes": [[left, top, right, bottom], ...] (from 0 to
    1) the layout is fixed."""
    out: Path
    """Folder for the pictures, the layouts (layouts.json, layouts.png), the contact sheet and the record."""
    model: Path
    """Folder of a model of scene graphs, such as `sfumato train trf-sg2im` writes."""
    seeds: str = "0"
    """Seeds, as in 7 or 0-3 or 1,5,9; every graph is drawn once with each."""
    layouts_only: bool = False
    """Draw no pictures."""
    top_k: Count | None = None
    """Of how many of the likeliest codes one is drawn; by default the model's own number."""
    temperature: Temperature | None = None
    """What logits are divided by before; by default the model's own."""
    top_p: Share | None = None
    """Only the likeliest codes that together have this probability; by default the model's own."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\nTransformer-based image generation from scene graphs, arXiv:2303.04634."
    options = Graph(**parse("sfumato graph", seed_alias(args), Graph, about=about)[0])
    seeds = read_seeds(options.seeds)
    if not options.graphs:
        raise BadInput(f"name at least one file of scene graphs, as in `{EXAMPLE}`")
    refuse_existing(options.out, options.overwrite)

    from sfumato.data.graphs import read_graphs

    graphs = [graph for file in options.graphs for graph in read_graphs(file)]

    from sfumato.pipeline import GraphModel

    model: Any = load_any(str(options.model), options)
    if not isinstance(model, GraphModel):
        raise BadInput(f"{options.model} is no model of scene graphs: `sfumato train trf-sg2im` makes one")
    model.told(graphs)  # all of them, before any is drawn
    asked, each = [graph for graph in graphs for _ in seeds], seeds * len(graphs)
    writes = [f"{options.out}/ (layouts.json, layouts.png, PNG, sheet.png, graph.json)"]
    Plan(f"{counted(len(asked), 'layout')} of {counted(len(graphs), 'graph')}", writes=writes).show()
    layouts = model.layouts(asked, each)
    how = {name: getattr(options, name) for name in ("top_k", "temperature", "top_p")}
    pictures = None if options.layouts_only else model.draw(asked, each, progress=True, **how)
    used = {name: model.defaults[name] if value is None else value for name, value in how.items()}
    about_all = {"model": str(options.model), "model-sha256": model.describe()["sha256"], **used}
    with atomic_folder(options.out, options.overwrite) as folder:
        write_json(folder / "layouts.json", [told(*pair) for pair in zip(asked, layouts, strict=True)])
        boards = np.stack([drawn(layout) for layout in layouts])
        save_png(folder / "layouts.png", contact_sheet(boards, len(seeds)), {**about_all, "seeds": seeds})
        if pictures is not None:
            arrays = (pictures.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
            for i, (array, seed) in enumerate(zip(arrays, each, strict=True)):
                save_png(folder / f"{i:03d}-graph{i // len(seeds)}-seed{seed}.png", array, {**about_all, "seed": seed})
            save_png(folder / "sheet.png", contact_sheet(arrays, len(seeds)), {**about_all, "seeds": seeds})
        record = {**asdict(options), **about_all, "graphs": [asdict(g) for g in graphs], "seeds": seeds}
        write_json(folder / "graph.json", {**record, "source": GENERATED})
    print(f"{counted(len(asked), 'layout')} in {options.out / 'layouts.json'}, drawn in {options.out / 'layouts.png'}")
    if pictures is not None:
        print(f"{counted(len(asked), 'picture')}, side by side in {options.out / 'sheet.png'}")


def told(graph: SceneGraph, layout: Layout) -> dict[str, Any]:
    """A graph with the boxes of its layout: what the command takes as a fixed one. ``classes`` are the layout's, where
    it has others than were asked for."""
    fixed = {**asdict(graph), "boxes": layout.boxes}
    return fixed if layout.objects == graph.objects else {**fixed, "classes": layout.objects}


def drawn(layout: Layout, side: int = SIDE) -> np.ndarray:
    """Boxes with their names on white, each in a colour of its own."""
    from PIL import Image, ImageDraw

    board = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(board)
    for i, (name, box) in enumerate(zip(layout.objects, layout.boxes, strict=True)):
        colour = f"hsl({360 * i // len(layout.objects)}, 70%, 40%)"
        corners = [round(x * (side - 1)) for x in box]
        pen.rectangle(corners, outline=colour, width=2)
        pen.text((corners[0] + 4, corners[1] + 3), name, fill=colour)
    return np.asarray(board)
