"""Look at the sketch world or time it: `python -m sfumato.data.sketch --bench` or `--sheet FILE.png`."""

from __future__ import annotations

import argparse
import time

import numpy as np
from PIL import Image

from . import BACKGROUNDS, COLOURS, OBJECTS, STYLES, batch, render, sample_scene


def bench(n: int, size: int) -> float:
    """Captioned pictures per second in this process, tables warm."""
    rng = np.random.default_rng(0)
    batch(rng, 200, size)
    began = time.perf_counter()
    batch(rng, n, size)
    return n / (time.perf_counter() - began)


def sheet(size: int, seed: int) -> Image.Image:
    """One picture per object (columns) and style (rows), colours and backgrounds in turn."""
    rng = np.random.default_rng(seed)
    rows = []
    for j, style in enumerate(STYLES):
        row = []
        for i, kind in enumerate(OBJECTS):
            colour, background = COLOURS[(i + j) % len(COLOURS)], BACKGROUNDS[(i + 2 * j) % len(BACKGROUNDS)]
            scene = sample_scene(rng, 1, object=kind, colour=colour, background=background, style=style)
            row.append(render(scene, size))
        rows.append(np.concatenate(row, axis=1))
    return Image.fromarray(np.concatenate(rows, axis=0))


parser = argparse.ArgumentParser(prog="python -m sfumato.data.sketch", description=__doc__)
parser.add_argument("--bench", action="store_true", help="print captioned pictures per second on one core")
parser.add_argument("--sheet", metavar="FILE", help="write a contact sheet of every object in every style")
parser.add_argument("--n", type=int, default=5000, help="pictures to time")
parser.add_argument("--size", type=int, default=64, help="side in pixels")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
if not args.bench and not args.sheet:
    parser.error("say --bench, or --sheet FILE")
if args.bench:
    print(f"{bench(args.n, args.size):.0f} captioned pictures/s at {args.size}x{args.size}")
if args.sheet:
    sheet(args.size, args.seed).save(args.sheet)
