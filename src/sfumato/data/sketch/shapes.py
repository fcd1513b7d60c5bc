"""The objects of the sketch world as polygons, and their signed distance fields.

A distance field is what makes one drawing serve all styles and sizes: filling, stroking, wobbling and stroke
width are arithmetic on the distance, and sampling it at any pixel pitch gives an anti-aliased edge.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

REACH = 1.3
"""Half the side of the square on which a field is tabulated; the object itself lies in [-1, 1] x [-1, 1]."""
GRID = 256
"""Samples per side of a tabulated field."""


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, n: int = 48) -> np.ndarray:
    angle = np.radians(np.linspace(start, stop, n))
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def _mirror(right: list[tuple[float, float]]) -> np.ndarray:
    """Close a right-hand contour, listed from top to bottom, with its mirror image."""
    half = np.array(right)
    return np.concatenate([half, half[::-1] * [-1, 1]])


def _star() -> np.ndarray:
    angle = np.radians(-90 + 36 * np.arange(10))
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.43)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1)


def _moon() -> np.ndarray:
    outer = _arc(0, 0, 1, 1, 55, 305)
    inner = _arc(0.55, 0, 0.82, 0.82, 266, 94)
    return np.concatenate([outer, inner])


def _polygon(name: str) -> np.ndarray:
    match name:
        case "circle":
            return _arc(0, 0, 1, 1, 0, 354.375, 64)
        case "square":
            return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
        case "triangle":
            return np.array([(0, -0.95), (1, 0.85), (-1, 0.85)])
        case "star":
            return _star()
        case "heart":
            return _heart()
        case "moon":
            return _moon()
        case "cross":
            return _mirror([(0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36), (0.36, 1)])
        case "arrow":
            return np.array(
                [(-1, -0.32), (0.05, -0.32), (0.05, -0.9), (1, 0), (0.05, 0.9), (0.05, 0.32), (-1, 0.32)]
            )
        case "house":
            return _mirror([(0, -1), (1, -0.05), (0.76, -0.05), (0.76, 0.95)])
        case "tree":
            return _mirror(
                [(0, -1), (0.55, -0.3), (0.32, -0.3), (0.85, 0.48), (0.22, 0.48), (0.22, 1)]
            )
        case "fish":
            body = _arc(-0.3, 0, 0.74, 0.64, 13, 347)
            return np.concatenate([body, [(1, -0.66), (0.84, 0), (1, 0.66)]])
        case "mushroom":
            cap = _arc(0, 0.12, 1, 1.0, 180, 360)
            stem = [(0.92, 0.28), (0.36, 0.28), (0.44, 0.92), (-0.44, 0.92), (-0.36, 0.28), (-0.92, 0.28)]
            return np.concatenate([cap, stem])
    raise KeyError(name)


OBJECTS = (
    "circle", "square", "triangle", "star", "heart", "moon",
    "cross", "arrow", "house", "tree", "fish", "mushroom",
)  # fmt: skip

_DETAILS: dict[str, tuple[np.ndarray, ...]] = {
    "house": (np.array([(-0.2, 0.3), (0.2, 0.3), (0.2, 1), (-0.2, 1)]),),
    "fish": (_arc(-0.62, -0.14, 0.14, 0.14, 0, 337.5, 16),),
    "mushroom": (
        _arc(-0.42, -0.2, 0.19, 0.19, 0, 337.5, 16),
        _arc(0.15, -0.5, 0.19, 0.19, 0, 337.5, 16),
        _arc(0.55, -0.05, 0.17, 0.17, 0, 337.5, 16),
    ),
}


def _distance(points: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon on the grid, negative inside (even-odd rule)."""
    axis = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH
    x, y = axis[None, :], axis[:, None]
    square = np.full((GRID, GRID), np.inf)
    inside = np.zeros((GRID, GRID), dtype=bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        dx, dy = bx - ax, by - ay
        if dx == 0 and dy == 0:
            continue
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        square = np.minimum(square, (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2)
        if dy != 0:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ax + (y - ay) * dx / dy)
    return np.where(inside, -1, 1) * np.sqrt(square)


@cache
def field(name: str) -> Image.Image:
    """Signed distance field of an object, as a float image over [-REACH, REACH]^2, negative inside."""
    points = _polygon(name)
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) * (2 / (high - low).max())
    return Image.fromarray(_distance(points).astype(np.float32))


@cache
def detail(name: str) -> Image.Image | None:
    """Field of the small marks inside an object (a door, an eye, spots), or None where it has none."""
    if name not in _DETAILS:
        return None
    points = _polygon(name)
    low, high = points.min(axis=0), points.max(axis=0)
    marks = [_distance((mark - (low + high) / 2) * (2 / (high - low).max())) for mark in _DETAILS[name]]
    return Image.fromarray(np.minimum.reduce(marks).astype(np.float32))


@cache
def half_extent(name: str) -> tuple[float, float]:
    """Half width and half height of the object's bounding box when its longer side is 2."""
    points = _polygon(name)
    span = points.max(axis=0) - points.min(axis=0)
    return float(span[0] / span.max()), float(span[1] / span.max())


def sample(table: Image.Image, x: float, y: float, scale: float, size: int) -> np.ndarray:
    """Distances at the pixel centres of a size x size canvas, in units of the canvas side.

    The object's centre lies at (x, y) and its longer side is `scale`, both as fractions of the canvas.
    """
    gain = GRID / (REACH * scale)
    step = gain / size
    origin_x = GRID / 2 - gain * x
    origin_y = GRID / 2 - gain * y
    out = table.transform(
        (size, size),
        Image.Transform.AFFINE,
        (step, 0, origin_x, 0, step, origin_y),
        resample=Image.Resampling.BILINEAR,
        fillcolor=REACH,
    )
    return np.asarray(out) * np.float32(scale / 2)
