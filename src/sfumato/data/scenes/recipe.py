"""How the scene oracle is made and measured: scenes that stray a little, training, confusion matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..oracle.recipe import blob, degrade, empty, jpeg, noise, write
from ..sketch import COLOURS, OBJECTS, Scene, render, sample_scene, training_scene
from ..sketch.mix import is_inside
from . import CARD, GRID, LARGE, SIDE, SIZES, WEIGHTS, Found, SceneOracle, holds

UPDATES = 1800
BATCH = 64
RATE = 3e-3
EVALUATION_SEED = 10**9 + 1
"""Scenes that count for the accuracy come from this generator seed, never used in training."""
NEAR = 0.1
"""An object counts as found when its centre is this near, as a fraction of the picture's side."""


def _strayed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with more jitter than the world has; what lies inside another object moves with it."""
    together, items = rng.uniform(-0.04, 0.04, 2) if is_inside(scene) else None, []
    for item in scene.objects:
        scale = float(item.scale * rng.uniform(0.88, 1.1))
        dx, dy = rng.uniform(-0.05, 0.05, 2) if together is None else together
        bound = lambda at, half=scale / 2: float(np.clip(at, min(half, 0.5), max(1 - half, 0.5)))
        items.append(replace(item, x=bound(item.x + dx), y=bound(item.y + dy), scale=scale))
    return replace(scene, objects=tuple(items))


def example(rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
    """One training picture and what can be seen in it: scenes, strayed scenes; now and then formless things."""
    scene, kind = training_scene(rng), rng.random()
    if kind < 0.92:
        scene = _strayed(scene, rng) if rng.random() < 0.6 else scene
        return render(scene), scene
    nothing = empty(scene)
    if kind < 0.95:
        return blob(sample_scene(rng, 1, background=scene.background), rng), nothing
    if kind < 0.98:  # too faint to see
        ground, picture = render(nothing).astype(np.float32), render(scene).astype(np.float32)
        return (ground + rng.uniform(0, 0.10) * (picture - ground)).astype(np.uint8), nothing
    return noise(rng), nothing


def batch(rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, list[Scene]]:
    """Pictures [n, 3, side, side] in [0, 1] and what they show."""
    examples = [example(rng) for _ in range(BATCH)]
    pictures = [jpeg(p, int(rng.integers(25, 85))) if rng.random() < 0.15 else p for p, _ in examples]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return degrade(images, rng, generator, warp=False), [scene for _, scene in examples]


def loss(cells: dict[str, Tensor], scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Cross-entropies and absolute errors of the places.

    Whether something is there is asked of all cells but the neighbours of a centre; what and where, of the centre and
    its neighbours.
    """
    there = torch.zeros(len(scenes), SIZES, GRID, GRID)
    asked = torch.ones_like(there)
    at: list[tuple[int, int, int, int]] = []
    what: list[tuple[int, int]] = []
    where: list[tuple[float, float, float]] = []
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            size = int(item.scale >= LARGE)
            column, row = (min(int(v * GRID), GRID - 1) for v in (item.x, item.y))
            for r in range(max(row - 1, 0), min(row + 2, GRID)):
                for c in range(max(column - 1, 0), min(column + 2, GRID)):
                    asked[i, size, r, c] = float(there[i, size, r, c])
                    at.append((i, size, r, c))
                    what.append((OBJECTS.index(item.object), COLOURS.index(item.colour)))
                    where.append((item.x * GRID - c - 0.5, item.y * GRID - r - 0.5, item.scale))
            there[i, size, row, column] = asked[i, size, row, column] = 1
    bce = nn.functional.binary_cross_entropy_with_logits(cells["there"][:, :, 0], there, asked, reduction="sum")
    i, size, r, c = torch.tensor(at).T
    words, places = torch.tensor(what), torch.tensor(where)
    read = {name: field[i, size, :, r, c] for name, field in cells.items()}
    return {
        "there": bce / max(1.0, float(there.sum())),
        "object": nn.functional.cross_entropy(read["object"], words[:, 0]),
        "colour": nn.functional.cross_entropy(read["colour"], words[:, 1]),
        "place": nn.functional.l1_loss(read["place"], places),
    }


def matched(scene: Scene, found: Sequence[Found]) -> list[Found | None]:
    """For each object of the scene the nearest one found within `NEAR`, each used once."""
    left, result = list(found), []
    for item in scene.objects:
        distance = lambda f, a=item: max(abs(f.x - a.x), abs(f.y - a.y)) + abs(f.scale - a.scale) / 4
        best = min(left, key=distance, default=None)
        if best is not None and max(abs(best.x - item.x), abs(best.y - item.y)) < NEAR:
            left.remove(best)
            result.append(best)
        else:
            result.append(None)
    return result


def measure(oracle: SceneOracle, n: int, seed: int = EVALUATION_SEED) -> dict[str, Any]:
    """Rates and confusion counts over ``n`` fresh scenes with one, two and three objects in equal parts."""
    rng = np.random.default_rng(seed)
    counts = {"object": np.zeros((12, 13), int), "colour": np.zeros((8, 9), int)}
    tally = dict.fromkeys(("objects", "objects_right", "scenes_right", "relations", "relations_right", "too_many"), 0)
    for start in range(0, n, 100):
        scenes = [sample_scene(rng, 1 + i % 3) for i in range(start, min(start + 100, n))]
        images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
        for scene, found in zip(scenes, oracle.read(images), strict=True):
            seen = matched(scene, found)
            right = 0
            for item, one in zip(scene.objects, seen, strict=True):
                kind = OBJECTS.index(one.object) if one else len(OBJECTS)
                hue = COLOURS.index(one.colour) if one else len(COLOURS)
                counts["object"][OBJECTS.index(item.object), kind] += 1
                counts["colour"][COLOURS.index(item.colour), hue] += 1
                right += one is not None and (one.object, one.colour) == (item.object, item.colour)
            for a, relation, b in scene.relations:
                tally["relations"] += 1
                tally["relations_right"] += bool(seen[a] and seen[b] and holds(seen[a], relation, seen[b]))
            tally["objects"] += len(seen)
            tally["objects_right"] += right
            tally["scenes_right"] += right == len(seen) == len(found)
            tally["too_many"] += len(found) > len(seen)
    return {"n": n, **tally, "confusion": {k: v.tolist() for k, v in counts.items()}}


def train(
    out: str | Path,
    seed: int = 0,
    updates: int = UPDATES,
    n_test: int = 5000,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a scene oracle, round its weights to float16, measure it, and write weights and card to ``out``."""

    rng, generator = np.random.default_rng((seed, 2)), torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        oracle = SceneOracle().to(memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(oracle.parameters(), lr=RATE, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, updates, pct_start=0.15)
        for update in range(1, updates + 1):
            images, scenes = batch(rng, generator)
            losses = loss(oracle(images.contiguous(memory_format=torch.channels_last)), scenes)
            optimiser.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(oracle.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            if update % 50 == 0:
                parts = " ".join(f"{n} {v.item():.3f}" for n, v in losses.items())
                log(f"update {update}/{updates}  {parts}  {time.perf_counter() - began:.0f} s")
    oracle = oracle.to(memory_format=torch.contiguous_format).eval()
    weights = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in oracle.state_dict().items()}
    oracle.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    card = {
        **measure(oracle, n_test),
        "test_seed": EVALUATION_SEED,
        "seed": seed,
        "config": {"updates": updates, "batch": BATCH, "rate": RATE, "optimiser": "AdamW", "side": SIDE, "grid": GRID},
        "parameters": sum(p.numel() for p in oracle.parameters()),
        "seconds": round(time.perf_counter() - began),
        "torch": torch.__version__.split("+")[0],
    }
    write(Path(out), WEIGHTS, weights, CARD, card)
    log(f"objects right {card['objects_right'] / card['objects']:.2%}, scenes {card['scenes_right'] / n_test:.2%}")
    return card
