"""Pictures larger than a model's, seen in tiles that overlap, whose directions run into each other without a seam."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Tile = tuple[slice, slice]
"""Rows and columns of a picture."""


def starts(length: int, side: int, overlap: int, unit: int = 1) -> list[int]:
    """Where stretches of ``side`` begin that cover ``length``, evenly spaced, neighbours sharing ``overlap`` at least.

    Each begins at a multiple of ``unit``, so that a tile's latents lie on the grid of the whole picture's; the last one
    ends where the picture ends, and is shorter by less than ``unit`` where that is no multiple.

    Args:
        length, side, overlap, unit: in pixels; ``side`` is a multiple of ``unit``. As much of the overlap is kept as
            lets tiles advance by one unit.
    """
    if length <= side:
        return [0]
    last = -(-(length - side) // unit)
    step = max(1, (side - overlap) // unit)
    n = -(-last // step)
    return [unit * (i * last // n) for i in range(n + 1)]


def tiles_of(height: int, width: int, side: int, overlap: int, unit: int = 1) -> list[Tile]:
    """The tiles of a picture, row by row; one, the whole of it, where that is no larger than ``side``."""
    return [
        (slice(top, min(top + side, height)), slice(left, min(left + side, width)))
        for top in starts(height, side, overlap, unit)
        for left in starts(width, side, overlap, unit)
    ]


def window(tile: Tile, overlap: int) -> Float[Tensor, "height width"]:
    """Weights of a tile's pixels: 1 inside, falling linearly to the edges over ``overlap`` pixels; never zero."""
    ramps = []
    for part in tile:
        n = part.stop - part.start
        at = torch.arange(n, dtype=torch.float64)
        ramps.append(torch.minimum(at + 1, n - at).clamp_max(max(overlap, 1)) / max(overlap, 1))
    return ramps[0][:, None] * ramps[1]


def blended(
    shape: Sequence[int],
    tiles: Sequence[Tile],
    one: Callable[[Tile], Float[Tensor, "n channel rows columns"]],
    overlap: int,
) -> Float[Tensor, "n channel height width"]:
    """What ``one`` gives for each tile, laid over each other as means with the weights of `window`.

    A single tile is taken as it is. Where tiles disagree by d, the blend passes from one to the other in steps of about
    d / ``overlap`` a pixel; what they agree upon it leaves.
    """
    if len(tiles) == 1:
        return one(tiles[0])
    total, weights = None, torch.zeros(tuple(shape[-2:]), dtype=torch.float64)
    for tile in tiles:
        found, w = one(tile), window(tile, overlap)
        total = found.new_zeros(tuple(shape)) if total is None else total
        total[..., tile[0], tile[1]] += w.to(found) * found
        weights[tile] += w
    assert total is not None
    return total / weights.to(total)


def inside(
    part: Float[Tensor, "n channel rows columns"], tile: Tile, shape: Sequence[int]
) -> Float[Tensor, "n channel height width"]:
    """A tile in its place in a picture that is zero elsewhere; differentiable."""
    rows, columns = tile
    return F.pad(part, (columns.start, shape[-1] - columns.stop, rows.start, shape[-2] - rows.stop))
