"""How the oracle is made and measured: training pictures, training, evaluation, confusion matrices."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.files import sha256_of

from ..sketch import BACKGROUNDS, COLOURS, PALETTE, Item, Scene, render, sample_scene
from ..sketch.render import VARIANTS
from . import CARD, SIDE, WEIGHTS, WORDS, Oracle

STEPS = 1200
BATCH = 128
RATE = 3e-3
ATTRIBUTES = tuple(WORDS)
IGNORE = -100
"""Label of an attribute that a training picture does not decide."""
EVALUATION_SEED = 10**9
"""Renders that count for the accuracy come from this generator seed, never used in training."""


def labels(scene: Scene) -> list[int]:
    """The truth about a picture with one object or none, in the order of `ATTRIBUTES`."""
    item = scene.objects[0] if scene.objects else None
    words = (
        item.object if item else "nothing",
        item.colour if item else "nothing",
        scene.background,
        scene.style if item else "nothing",
    )
    return [WORDS[name].index(word) for name, word in zip(ATTRIBUTES, words, strict=True)]


def _loosened(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with more jitter than the world has: generated pictures stray from its statistics."""
    item = scene.objects[0]
    scale = float(np.clip(item.scale * rng.uniform(0.84, 1.15), 0.46, 0.84))
    stray = lambda at: float(np.clip(at + rng.uniform(-0.06, 0.06), scale / 2, 1 - scale / 2))
    return replace(scene, objects=(Item(item.object, item.colour, stray(item.x), stray(item.y), scale),))


def empty(scene: Scene) -> Scene:
    return replace(scene, objects=(), relations=())


def blob(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A formless patch of the scene's colour on its background."""
    knots = rng.normal(size=(5, 5)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(knots).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    fall = 1 - 3.2 * np.sqrt(axis[None, :] ** 2 + axis[:, None] ** 2)
    cover = np.clip((smooth + 2 * fall) * rng.uniform(2, 8), 0, 1)[..., None] * rng.uniform(0.6, 1)
    paint = np.array(PALETTE[scene.objects[0].colour], dtype=np.float32)
    ground = render(empty(scene)).astype(np.float32)
    return (ground + cover * (paint - ground)).astype(np.uint8)


def noise(rng: np.random.Generator) -> np.ndarray:
    """Random colours at a random coarseness."""
    cells = int(rng.choice([3, 5, 8, 16, 32]))
    rough = rng.normal(rng.uniform(60, 200), rng.uniform(20, 70), (cells, cells, 3))
    picture = Image.fromarray(np.clip(rough, 0, 255).astype(np.uint8))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _example(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """One training picture: mostly one object, else an empty, faint, formless, doubled or random one."""
    scene = sample_scene(rng, 1)
    truth = labels(scene)
    nothing = len(WORDS["object"]) - 1
    kind = rng.random()
    if kind < 0.84:
        return render(_loosened(scene, rng) if rng.random() < 0.5 else scene), truth
    if kind < 0.90:
        return render(empty(scene)), labels(empty(scene))
    if kind < 0.92:
        ground, picture = render(empty(scene)).astype(np.float32), render(scene).astype(np.float32)
        faint = ground + rng.uniform(0, 0.10) * (picture - ground)
        return faint.astype(np.uint8), labels(empty(scene))
    if kind < 0.95:
        return blob(scene, rng), [nothing, truth[1], truth[2], IGNORE]
    if kind < 0.98:
        for _ in range(1000):  # among so many scenes one shows another object
            other = sample_scene(rng, 1)
            if other.objects[0].object != scene.objects[0].object:
                break
        mean = render(scene).astype(np.float32) * 0.5 + render(other).astype(np.float32) * 0.5
        return mean.astype(np.uint8), [nothing, IGNORE, IGNORE, IGNORE]
    return noise(rng), [nothing, len(COLOURS), IGNORE, len(WORDS["style"]) - 1]


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _blur(images: Tensor, sigma: float) -> Tensor:
    at = torch.arange(-3, 4, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    images = nn.functional.pad(images, (3, 3, 3, 3), mode="replicate")
    images = nn.functional.conv2d(images, kernel.view(1, 1, 1, 7).repeat(3, 1, 1, 1), groups=3)
    return nn.functional.conv2d(images, kernel.view(1, 1, 7, 1).repeat(3, 1, 1, 1), groups=3)


def _warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 3 pixels, turn by up to 5 degrees and stretch by up to 6 %, each picture on its own."""
    n = len(images)
    draw = lambda width: torch.empty(n).uniform_(-width, width, generator=generator)
    turn, shift = draw(0.09), torch.stack([draw(6 / SIDE), draw(6 / SIDE)], dim=1)
    matrix = torch.stack([torch.cos(turn), -torch.sin(turn), torch.sin(turn), torch.cos(turn)], dim=1)
    matrix = matrix.view(n, 2, 2) * (1 + torch.stack([draw(0.06), draw(0.06)], dim=1))[:, None, :]
    grid = nn.functional.affine_grid(torch.cat([matrix, shift[..., None]], 2), list(images.shape), False)
    return nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def degrade(images: Tensor, rng: np.random.Generator, generator: torch.Generator, warp: bool = True) -> Tensor:
    """What generated pictures suffer from: blur, lost detail, small warps, drifting tone, grain."""
    parts = []
    for part in images.split(16):
        draw = rng.random()
        if draw < 0.35:
            part = _blur(part, float(rng.uniform(0.4, 1.1)))
        elif draw < 0.55:
            small = int(rng.integers(28, 56))
            part = nn.functional.interpolate(part, (small, small), mode="bilinear", antialias=True)
            part = nn.functional.interpolate(part, (SIDE, SIDE), mode="bicubic")
        if warp and rng.random() < 0.6:
            part = _warp(part, generator)
        parts.append(part)
    images = torch.cat(parts)
    between = lambda low, high: torch.empty(len(images), 1, 1, 1).uniform_(low, high, generator=generator)
    images = (images - 0.5) * between(0.88, 1.1) + 0.5 + between(-0.05, 0.05)
    # Half of the pictures stay free of grain, so that clean renders remain in the training distribution.
    images = images + between(-0.05, 0.05).clamp(min=0) * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1)


def _batch(rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    examples = [_example(rng) for _ in range(BATCH)]
    pictures = [jpeg(p, int(rng.integers(25, 85))) if rng.random() < 0.15 else p for p, _ in examples]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return degrade(images, rng, generator), torch.tensor([truth for _, truth in examples])


@torch.no_grad()
def confusion(oracle: Oracle, n: int, seed: int = EVALUATION_SEED) -> dict[str, np.ndarray]:
    """Counts [truth, reading] per attribute over n fresh single-object renders."""
    rng = np.random.default_rng(seed)
    counts = {name: np.zeros((len(words), len(words)), dtype=int) for name, words in WORDS.items()}
    for start in range(0, n, 250):
        scenes = [sample_scene(rng, 1) for _ in range(min(250, n - start))]
        images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
        truths = np.array([labels(scene) for scene in scenes])
        for column, (name, logits) in enumerate(oracle(images).items()):
            np.add.at(counts[name], (truths[:, column], logits.argmax(1).numpy()), 1)
    return counts


@torch.no_grad()
def empty_rate(oracle: Oracle) -> float:
    """Share of all empty backgrounds (every background in every variant) that read "nothing"."""
    scenes = [Scene((), b, "flat", texture_seed=v) for b in BACKGROUNDS for v in range(VARIANTS)]
    images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
    return float((oracle(images)["object"].argmax(1) == len(WORDS["object"]) - 1).float().mean())


def accuracy(counts: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of right readings per attribute."""
    return {name: float(np.trace(matrix) / matrix.sum()) for name, matrix in counts.items()}


def train_oracle(
    out: str | Path,
    seed: int = 0,
    steps: int = STEPS,
    n_test: int = 10_000,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train an oracle, round its weights to float16, measure it, and write weights and card to `out`.

    Returns the accuracy per attribute over `n_test` fresh renders, measured with the rounded weights.
    """

    rng = np.random.default_rng((seed, 1))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        oracle = Oracle().to(memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(oracle.parameters(), lr=RATE, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.15)
        began = time.perf_counter()
        for step in range(1, steps + 1):
            images, truth = _batch(rng, generator)
            readings = oracle(images.contiguous(memory_format=torch.channels_last))
            losses = [
                nn.functional.cross_entropy(readings[name], truth[:, i], ignore_index=IGNORE)
                for i, name in enumerate(ATTRIBUTES)
            ]
            loss = sum(losses)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % 50 == 0:
                parts = " ".join(f"{n} {v.item():.3f}" for n, v in zip(ATTRIBUTES, losses, strict=True))
                log(f"step {step}/{steps}  {parts}  {time.perf_counter() - began:.0f} s")
    oracle = oracle.to(memory_format=torch.contiguous_format).eval()
    weights = {
        k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in oracle.state_dict().items()
    }
    oracle.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    scores = accuracy(confusion(oracle, n_test))
    card = {
        "reads": {name: list(words) for name, words in WORDS.items()},
        "accuracy": scores,
        "n": n_test,
        "test_seed": EVALUATION_SEED,
        "empty_backgrounds_read_nothing": empty_rate(oracle),
        "seed": seed,
        "config": {"steps": steps, "batch": BATCH, "rate": RATE, "optimiser": "AdamW", "side": SIDE},
        "parameters": sum(p.numel() for p in oracle.parameters()),
        "seconds": round(time.perf_counter() - began),
        "torch": torch.__version__.split("+")[0],
    }
    write(Path(out), WEIGHTS, weights, CARD, card)
    log(json.dumps(scores))
    return scores


def write(folder: Path, weights_name: str, weights: dict[str, Tensor], card_name: str, card: dict[str, Any]) -> None:
    """An oracle's weights and the card that has their hash: each file whole or as it was."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / (weights_name + ".part")
    save_file(weights, fresh)
    card["sha256"] = sha256_of(fresh)
    os.replace(fresh, folder / weights_name)
    fresh = folder / (card_name + ".part")
    fresh.write_text(json.dumps(card, indent=1) + "\n")
    os.replace(fresh, folder / card_name)
