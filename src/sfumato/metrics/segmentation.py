"""How well found segments match true ones, whatever their numbers: FG-ARI and mean IoU."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.errors import BadInput

BACKGROUND = -1


def foreground_ari(
    truth: Int[Tensor, "batch *pixels"], found: Int[Tensor, "batch *pixels"]
) -> Float[Tensor, "batch"]:
    """The adjusted Rand index on the pixels whose true segment is not `BACKGROUND`, which is any negative number.

    1 for the same segments under any names, 0 in the mean for random ones. Where there is one true segment and one
    found, 1; NaN where there are fewer than two such pixels.

    Raises:
        BadInput: maps of different shapes.
    """
    if truth.shape != found.shape:
        raise BadInput(f"maps of segments have one shape, not {list(truth.shape)} and {list(found.shape)}")
    return torch.stack([_ari(t, f) for t, f in zip(truth.flatten(1), found.flatten(1), strict=True)])


def _ari(truth: Tensor, found: Tensor) -> Tensor:
    kept = truth >= 0
    n = int(kept.sum())
    if n < 2:
        return torch.tensor(float("nan"), dtype=torch.float64)
    table = _table(truth[kept], found[kept]).double()
    pairs = lambda x: (x * (x - 1)).sum() / 2
    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance, most = rows * columns / (n * (n - 1) / 2), (rows + columns) / 2
    return torch.ones_like(both) if most == chance else (both - chance) / (most - chance)


def mean_iou(truth: Int[Tensor, "batch *pixels"], found: Int[Tensor, "batch *pixels"]) -> Float[Tensor, "batch"]:
    """Of each true segment but the background, the best intersection over union with any found one but its background,
    in the mean over the segments; NaN where there is none.

    Raises:
        BadInput: maps of different shapes.
    """
    if truth.shape != found.shape:
        raise BadInput(f"maps of segments have one shape, not {list(truth.shape)} and {list(found.shape)}")
    return torch.stack([_iou(t, f) for t, f in zip(truth.flatten(1), found.flatten(1), strict=True)])


def _iou(truth: Tensor, found: Tensor) -> Tensor:
    best = []
    for number in truth[truth >= 0].unique():
        mask, overlaps = truth == number, [truth.new_zeros((), dtype=torch.float64)]
        for other in found[mask & (found >= 0)].unique():
            there = found == other
            overlaps.append((mask & there).sum().double() / (mask | there).sum())
        best.append(torch.stack(overlaps).max())
    return torch.stack(best).mean() if best else torch.tensor(float("nan"), dtype=torch.float64)


def _table(one: Tensor, other: Tensor) -> Int[Tensor, "row column"]:
    """How many pixels have each pair of numbers."""
    i, j = (x.unique(return_inverse=True)[1] for x in (one, other))
    table = torch.zeros(int(i.max()) + 1, int(j.max()) + 1, dtype=torch.long, device=one.device)
    return table.index_put_((i, j), torch.ones_like(i), accumulate=True)
