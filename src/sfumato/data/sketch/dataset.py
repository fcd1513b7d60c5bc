"""Streams of captioned pictures: fast batches of arrays, and an indexable dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sfumato.errors import BadInput

from .captions import caption
from .render import render
from .scene import Scene, sample_scene

DEFAULT_MIX = (0.70, 0.18, 0.10)
"""Shares of pictures with one, two and three objects; the rest (2 %) are empty backgrounds."""


def _draw_count(rng: np.random.Generator, n_objects_probs: Sequence[float]) -> int:
    probs = np.asarray(n_objects_probs, dtype=float)
    if len(probs) > 3 or (probs < 0).any() or probs.sum() > 1 + 1e-9:
        raise BadInput("n_objects_probs takes up to three shares, for 1, 2 and 3 objects, of sum at most 1")
    above = np.flatnonzero(rng.random() < np.cumsum(probs))
    return int(above[0]) + 1 if above.size else 0


def scenes(rng: np.random.Generator, n: int, n_objects_probs: Sequence[float] = DEFAULT_MIX) -> list[Scene]:
    """n random scenes; `n_objects_probs` as in `batch`."""
    return [sample_scene(rng, _draw_count(rng, n_objects_probs)) for _ in range(n)]


def batch(
    rng: np.random.Generator,
    n: int,
    size: int = 64,
    n_objects_probs: Sequence[float] = DEFAULT_MIX,
) -> tuple[np.ndarray, list[str]]:
    """n fresh captioned pictures.

    Args:
        rng: the only source of randomness.
        n: how many.
        size: side in pixels.
        n_objects_probs: shares of pictures with one, two, three objects; what is missing to 1 is empty.

    Returns:
        uint8 array (n, size, size, 3) and n captions.
    """
    drawn = scenes(rng, n, n_objects_probs)
    images = np.empty((n, size, size, 3), dtype=np.uint8)
    for row, scene in zip(images, drawn, strict=True):
        row[:] = render(scene, size)
    return images, [caption(scene, rng) for scene in drawn]


class SketchDataset:
    """Map-style dataset for a torch DataLoader: item i is decided by (seed, i) alone.

    Each item is a dict with `image` (float32 tensor (3, size, size) in [-1, 1]), `caption` (str) and `scene`
    (its JSON, so that default collation works).
    """

    def __init__(
        self,
        length: int,
        size: int = 64,
        seed: int = 0,
        n_objects_probs: Sequence[float] = DEFAULT_MIX,
    ) -> None:
        self.length, self.size, self.seed, self.n_objects_probs = length, size, seed, tuple(n_objects_probs)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        scene = sample_scene(rng, _draw_count(rng, self.n_objects_probs))
        image = torch.from_numpy(render(scene, self.size)).permute(2, 0, 1).float() / 127.5 - 1
        return {"image": image, "caption": caption(scene, rng), "scene": scene.to_json()}
