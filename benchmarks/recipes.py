"""A training step of the recipes for other conditions than classes, against one of SiD2; attention by length.

    python benchmarks/recipes.py
    python benchmarks/recipes.py --only dorsal omnigen --batch 16 --repeats 5

Each recipe with a preset for a CPU, on the world that it is for; every loop of it counts alone, the fastest of
``--repeats`` updates. Beside it stands SiD2 at the same side and batch (rows; a row of DORSal is a scene of views): the
parameters of all that a model is saved with are told, also those that a loop does not train. Then a causal
transformer's forward and training step by the length of its sequences.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from sfumato import catalog
from sfumato.nets.image_transformer import ImageTransformer
from sfumato.pipeline import load
from sfumato.train.sid2 import SiD2
from timing import of_updates, timed

PLAIN = {32: "small-cifar10", 64: "small-sketch"}
"""SiD2's preset at each side."""
RECIPES: dict[str, dict[str, Any]] = {
    "semantica": {"preset": "small-sketch", "size": 32, "pictures": 300},
    "hfd": {"preset": "tiny-photos", "data": "sketch", "size": 64, "crop": None, "pictures": 60},
    "trf-sg2im": {"preset": "small-sketch", "size": 32, "pictures": 300},
    "dorsal": {"preset": "small", "size": 32, "pictures": 20},
    "cpdm": {"preset": "small-cifar10", "data": "digits", "size": 32, "first": 0.5, "after": 1, "classifier_epochs": 1,
             "replay": 2, "sampling_steps": 2},
    "omnigen": {"preset": "tiny-sketch", "size": 32, "pictures": 60},
}  # fmt: skip
"""Presets, and what is changed of them."""
LOOPS = ("updates", "code_updates", "layout_updates", "codec_updates", "osrt_updates")
BATCHES = ("batch", "code_batch", "layout_batch", "codec_batch", "osrt_batch")
QUIET: dict[str, Any] = {"checkpoint_every": 1000, "grid_every": 0, "track": "none"}
LENGTHS = (256, 512, 1024, 2048, 4096)


def made(name: str, batch: int, repeats: int) -> Any:
    """The recipe, for so many updates of so many rows in each of its loops."""
    cls = catalog.get(name, "train").load()
    told = {**RECIPES[name]}
    settings = {**cls.presets[told.pop("preset")], **told}
    same = {**dict.fromkeys(LOOPS, repeats + 1), **dict.fromkeys(BATCHES, batch), **QUIET}
    known = {field.name for field in fields(cls) if field.init}
    return cls(**{**settings, **{name: value for name, value in same.items() if name in known}})


def parameters(folder: Path) -> int:
    """Of all networks that the model in a folder was saved with."""
    model: Any = load(str(folder))
    return sum(p.numel() for part in model.parts().values() for p in part.parameters())


def steps(names: list[str], batch: int, repeats: int) -> None:
    print(f"{'an update':44}{'parameters':>12}{'seconds':>10}{'of SiD2':>9}")
    seen: dict[int, float] = {}
    for name in names:
        size = RECIPES[name]["size"]
        with tempfile.TemporaryDirectory() as folder:
            if size not in seen:
                data = {"data": "sketch", "size": size, "pictures": 300, "flip": False}
                plain = SiD2(
                    **{**SiD2.presets[PLAIN[size]], **data, **QUIET, "batch": batch, "updates": repeats + 1}
                )
                place = Path(folder) / "plain"
                seen[size] = min(of_updates(partial(plain.run, place, progress=False)).values())
                print(f"{f'SiD2, {size} pixels':44}{parameters(place / 'model'):12,}{seen[size]:10.3f}{1:9.2f}")
            found = of_updates(partial(made(name, batch, repeats).run, Path(folder) / name, progress=False))
            count = parameters(Path(folder) / name / "model")
        for title, seconds in found.items():
            told = f"{name}: {title}" if title != name else name
            print(f"{told:44}{count:12,}{seconds:10.3f}{seconds / seen[size]:9.2f}", flush=True)


def attention(repeats: int, width: int = 256, depth: int = 2, heads: int = 8) -> None:
    """A transformer of few blocks, one row, by the number of tokens."""
    net = ImageTransformer(512, 512, max(LENGTHS), width, depth, heads, dropout=0.0)

    def forward(tokens: torch.Tensor) -> None:
        with torch.no_grad():
            net(tokens)

    def step(tokens: torch.Tensor) -> None:
        cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        net.zero_grad()

    works: dict[str, Callable[[], object]] = {}
    for length in LENGTHS:
        tokens = torch.zeros(1, length, dtype=torch.long)
        works |= {f"{length} forward": partial(forward, tokens), f"{length} step": partial(step, tokens)}
    best = timed(works, repeats)
    print(f"\n{f'{depth} blocks of {width}, tokens':44}{'forward, s':>12}{'step, s':>10}{'of the one before':>19}")
    before = None
    for length in LENGTHS:
        ahead, both = best[f"{length} forward"], best[f"{length} step"]
        print(f"{length:<44}{ahead:12.4f}{both:10.4f}{f'{both / before:.2f}' if before else '':>19}")
        before = both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, batches of {args.batch}")
    steps(args.only, args.batch, args.repeats)
    attention(args.repeats)


if __name__ == "__main__":
    main()
