"""Sequences: the objects of a scene move in straight lines and bounce off the border of the picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sfumato.errors import BadInput

from .scene import Scene, sample_scene
from .shapes import half_extent


def bounce(start: float, velocity: float, time: float, low: float, high: float) -> float:
    """Position at `time` of a point that moves at `velocity` between two walls and reflects off them exactly.

    The reflected path on [low, high] is the straight path folded: a triangle wave of period 2 (high - low),
    so no error builds up and any time, also a fractional or negative one, can be asked for directly.

    Args:
        start: position at time 0, in [low, high].
        velocity: displacement per unit of time, of either sign.
        time: any real number.
        low, high: the walls; low < high.
    """
    span = high - low
    along = (start - low + velocity * time) % (2 * span)
    return low + (along if along <= span else 2 * span - along)


def sequence(
    rng: np.random.Generator,
    n_frames: int,
    n_objects: int = 1,
    *,
    speed: tuple[float, float] = (0.02, 0.06),
    object: str | None = None,
    colour: str | None = None,
    background: str | None = None,
    style: str | None = None,
) -> list[Scene]:
    """Frames of a random scene in motion; `render` draws each.

    Every object keeps its own straight course and reflects where its bounding box meets the border; objects
    pass over one another.  What two objects' places relate to changes from frame to frame, so the frames
    state no relations.

    Args:
        rng: the only source of randomness.
        n_frames: at least 1.
        n_objects: 1 to 3.
        speed: slowest and fastest speed, in picture sides per frame; the direction is uniform.
        object, colour, background, style: fixed as in `sample_scene`.

    Raises:
        BadInput: for a number of frames or objects out of range.
    """
    if n_frames < 1 or not 1 <= n_objects <= 3:
        raise BadInput(f"a sequence has 1 or more frames and 1 to 3 objects, not {n_frames} and {n_objects}")
    scene = sample_scene(
        rng, n_objects, object=object, colour=colour, background=background, style=style
    )
    courses = []
    for item in scene.objects:
        scale = float(rng.uniform(0.50, 0.58) if n_objects == 1 else rng.uniform(0.44, 0.48))
        walls = [(extent * scale / 2, 1 - extent * scale / 2) for extent in half_extent(item.object)]
        start = [float(rng.uniform(low, high)) for low, high in walls]
        angle, pace = rng.uniform(0, 2 * np.pi), rng.uniform(*speed)
        velocity = (float(pace * np.cos(angle)), float(pace * np.sin(angle)))
        courses.append((replace(item, scale=scale), start, velocity, walls))
    frames = []
    for time in range(n_frames):
        items = []
        for item, start, velocity, walls in courses:
            x, y = (bounce(s, v, time, *wall) for s, v, wall in zip(start, velocity, walls, strict=True))
            items.append(replace(item, x=x, y=y))
        frames.append(replace(scene, objects=tuple(items), relations=()))
    return frames
