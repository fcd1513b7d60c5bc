"""Scenes to pictures: backgrounds, styles and compositing, as a pure function of the scene."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .scene import Item, Scene
from .shapes import detail, field, sample

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 55),
    "orange": (247, 133, 28),
    "yellow": (250, 208, 40),
    "green": (38, 156, 76),
    "cyan": (38, 196, 208),
    "blue": (44, 92, 220),
    "purple": (140, 64, 200),
    "pink": (248, 128, 182),
}
CREAM = np.array((255, 250, 240), dtype=np.float32)
VARIANTS = 4
"""Number of cloud, star, hill and grain patterns; a scene's texture seed picks one."""
BLOCKS = 16
"""Blocks per side in the pixel style."""
SPRITE = 7
"""Smallest longer side of a pixel-style object, in blocks; smaller ones could not be told apart."""
STROKE = 4.2 / 64
"""Width of the outline, as a fraction of the canvas side."""
HALO = 1.6 / 64
"""Width of the light rim around an object that lies inside another, as a fraction of the canvas side."""
PERIOD = 8 / 64
"""Stripe period, along either axis, as a fraction of the canvas side."""


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return axis[None, :], axis[:, None]


def _mix(a: tuple[int, int, int], b: tuple[int, int, int], weight: np.ndarray) -> np.ndarray:
    w = np.clip(weight, 0, 1)[..., None].astype(np.float32)
    return np.array(a, dtype=np.float32) * (1 - w) + np.array(b, dtype=np.float32) * w


def _disc(size: int, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    """Anti-aliased coverage of an ellipse."""
    x, y = _grid(size)
    radius = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)
    return np.clip(0.5 - (radius - 1) * min(rx, ry) * size, 0, 1)


_CLOUDS = (
    ((0.22, 0.16), (0.80, 0.30), (0.30, 0.86)),
    ((0.75, 0.14), (0.14, 0.34), (0.74, 0.88)),
    ((0.30, 0.12), (0.84, 0.62), (0.16, 0.78)),
    ((0.68, 0.18), (0.16, 0.60), (0.82, 0.84)),
)
_STARS = (
    ((0.12, 0.14), (0.45, 0.08), (0.84, 0.18), (0.08, 0.58), (0.92, 0.52), (0.26, 0.90), (0.74, 0.88)),
    ((0.22, 0.08), (0.66, 0.10), (0.92, 0.32), (0.07, 0.36), (0.14, 0.80), (0.56, 0.93), (0.90, 0.76)),
    ((0.08, 0.22), (0.36, 0.12), (0.76, 0.08), (0.93, 0.42), (0.10, 0.90), (0.44, 0.91), (0.86, 0.86)),
    ((0.16, 0.10), (0.54, 0.07), (0.90, 0.12), (0.06, 0.46), (0.94, 0.66), (0.34, 0.94), (0.10, 0.82)),
)


@lru_cache(maxsize=256)
def backdrop(name: str, size: int, variant: int) -> np.ndarray:
    """The background alone: float32 (size, size, 3) in [0, 255]; do not write to it."""
    x, y = _grid(size)
    flat = np.broadcast_to(y, (size, size))
    if name == "white":
        return _mix((252, 252, 252), (252, 252, 252), flat)
    if name == "sky":
        picture = _mix((170, 212, 244), (214, 236, 251), flat)
        cover = np.zeros((size, size), dtype=np.float32)
        for cx, cy in _CLOUDS[variant]:
            for dx, dy, r in ((-0.09, 0.015, 0.055), (0.0, -0.02, 0.08), (0.09, 0.01, 0.06)):
                cover = np.maximum(cover, _disc(size, cx + dx, cy + dy, r * 1.1, r))
        return picture + cover[..., None] * (np.array((250, 253, 255), dtype=np.float32) - picture)
    if name == "grass":
        wave = y + 0.035 * np.sin(2 * np.pi * (x * 1.5 + 0.25 * variant)) - 0.25 * y * (1 - y)
        band = np.sin(2 * np.pi * wave * 4)
        return _mix((206, 232, 170), (180, 217, 140), 0.5 + band * size / 28)
    if name == "night":
        picture = _mix((24, 27, 62), (44, 50, 104), flat)
        cover = np.zeros((size, size), dtype=np.float32)
        for cx, cy in _STARS[variant]:
            cover = np.maximum(cover, _disc(size, cx, cy, 0.022, 0.022))
        return picture + cover[..., None] * (np.array((236, 232, 200), dtype=np.float32) - picture)
    if name == "checkerboard":
        odd = (np.floor(x * 4) + np.floor(y * 4)) % 2
        return _mix((242, 243, 247), (208, 212, 224), odd)
    if name == "dotted":
        dx, dy = (x * 4) % 1 - 0.5, (y * 4) % 1 - 0.5
        radius = np.sqrt(dx**2 + dy**2) / 4
        return _mix((252, 240, 226), (232, 204, 186), 0.5 - (radius - 0.055) * size)
    raise KeyError(name)


@lru_cache(maxsize=64)
def _noise(size: int, cells: int, variant: int) -> np.ndarray:
    """Smooth noise with `cells` knots per side (cosine interpolation), zero mean, float32 (size, size)."""
    knots = np.random.default_rng((cells, variant)).uniform(-1, 1, (cells + 1, cells + 1))
    at = (np.arange(size) + 0.5) / size * cells
    low = np.floor(at).astype(int)
    weight = 0.5 - 0.5 * np.cos(np.pi * (at - low))
    rows = knots[low] * (1 - weight)[:, None] + knots[low + 1] * weight[:, None]
    return (rows[:, low] * (1 - weight) + rows[:, low + 1] * weight).astype(np.float32)


@lru_cache(maxsize=8)
def _stripes(size: int) -> np.ndarray:
    """1 on the dark stripes, 0 between them, anti-aliased; the pattern is fixed to the canvas."""
    x, y = _grid(size)
    phase = ((x + y) / PERIOD) % 1
    # Distance to the nearest edge of a stripe that covers half a period, perpendicular to the diagonal.
    distance = (np.abs(phase - 0.5) - 0.25) * PERIOD / np.sqrt(2)
    return np.clip(0.5 - distance * size, 0, 1).astype(np.float32)


@lru_cache(maxsize=64)
def _hatching(size: int, variant: int) -> np.ndarray:
    """Opacity of chalk: wavering strokes, steeper than the stripes and leaning the other way."""
    x, y = _grid(size)
    phase = (x - y) / PERIOD + 0.30 * _noise(size, 10, variant + VARIANTS)
    stroke = 0.5 + 0.5 * np.cos(2 * np.pi * phase)
    return np.clip(0.42 + 0.75 * stroke + 0.22 * _noise(size, 16, variant + 2 * VARIANTS), 0.3, 1)


@lru_cache(maxsize=8)
def _block_index(size: int) -> np.ndarray:
    return np.minimum((np.arange(size) + 0.5) * BLOCKS // size, BLOCKS - 1).astype(int)


def _pixel_cover(item: Item, size: int) -> np.ndarray:
    """Coverage by whole blocks; the object is snapped to the block grid, so that sprites are symmetric."""
    blocks = max(round(item.scale * BLOCKS), SPRITE)
    x, y = ((round(at * BLOCKS - blocks / 2) + blocks / 2) / BLOCKS for at in (item.x, item.y))
    distance = sample(field(item.object), x, y, blocks / BLOCKS, 4 * BLOCKS)
    fine = np.clip(0.5 - distance * 4 * BLOCKS, 0, 1)
    cover = fine.reshape(BLOCKS, 4, BLOCKS, 4).mean(axis=(1, 3)) > 0.45
    index = _block_index(size)
    return cover.astype(np.float32)[np.ix_(index, index)]


def _layer(item: Item, style: str, variant: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (size, size) and paint (size, size, 3) or (3,) of one item."""
    paint = np.array(PALETTE[item.colour], dtype=np.float32)
    if style == "pixel":
        index = _block_index(size)
        tone = 1 - 0.24 * ((index[:, None] + index) % 2).astype(np.float32)
        return _pixel_cover(item, size), tone[..., None] * paint
    distance = sample(field(item.object), item.x, item.y, item.scale, size)
    if style == "outline":
        ring = np.abs(distance + np.float32(STROKE / 2)) - np.float32(STROKE / 2)
        return np.clip(0.5 - ring * size, 0, 1), paint
    if style == "chalk":
        rough = distance + np.float32(0.014) * _noise(size, 13, variant)
        return np.clip(0.5 - rough * 36, 0, 1) * _hatching(size, variant), paint
    if style == "stripes":
        paint = paint * (1 - 0.48 * _stripes(size)[..., None])
    marks = detail(item.object)
    if marks is not None and style == "flat":
        on = np.clip(0.5 - sample(marks, item.x, item.y, item.scale, size) * size, 0, 1)[..., None]
        paint = paint + on * (CREAM - paint)
    return np.clip(0.5 - distance * size, 0, 1), paint


def _halo(item: Item, size: int) -> np.ndarray:
    """Coverage of an item and a rim around it: sets an object off from the one that it lies inside."""
    distance = sample(field(item.object), item.x, item.y, item.scale, size)
    return np.clip(0.5 - (distance - np.float32(HALO)) * size, 0, 1)


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw; the same scene always gives the same picture.
        size: side of the picture in pixels; other sizes are the same drawing, sharper or coarser.

    Returns:
        uint8 array (size, size, 3), RGB.
    """
    picture = backdrop(scene.background, size, scene.texture_seed % VARIANTS)
    within = {subject for subject, relation, _ in scene.relations if relation == "inside"}
    for index, item in enumerate(scene.objects):
        if index in within and scene.style not in ("outline", "pixel"):
            picture = picture + _halo(item, size)[..., None] * (CREAM - picture)
        cover, paint = _layer(item, scene.style, (scene.texture_seed + index) % VARIANTS, size)
        picture = picture + cover[..., None] * (paint - picture)
    return (picture + 0.5).astype(np.uint8)
