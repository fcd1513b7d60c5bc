"""What is done to pictures that attributions are judged by: values taken away, or pictures moved, as pure functions.

All take pictures and maps of any shape with the pictures first, in any precision.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Of the eight neighbours: those beside a pixel twice as much as those at its corners.
NEIGHBOURS = {(i, j): (1 / 6 if 0 in (i, j) else 1 / 12) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)}


def unit(maps: Float[Tensor, "n *dims"]) -> Float[Tensor, "n *dims"]:
    """u = a / |a|, the Frobenius norm over all of a picture's values; a map that is all 0 stays so."""
    flat = maps.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)
    flat = flat / torch.where(largest > 0, largest, 1)  # squares of small numbers would vanish
    norm = flat.norm(dim=1, keepdim=True)
    return (flat / torch.where(norm > 0, norm, 1)).view_as(maps)


def radius(x: Float[Tensor, "n *dims"]) -> float:
    """r: the mean Euclidean distance of a picture from the mean of all."""
    return float((x - x.mean(0)).flatten(1).double().norm(dim=1).mean())


def moved(
    x: Float[Tensor, "n *dims"], maps: Float[Tensor, "n *dims"], eps: float, r: float, sign: Literal[-1, 1] = -1
) -> Float[Tensor, "n *dims"]:
    """x(eps) = x + sign eps r u: every picture goes the same length ``eps`` r along its map; -1 removes evidence."""
    return x + sign * eps * r * unit(maps)


def ranked(scores: Float[Tensor, "n size"], share: float) -> Bool[Tensor, "n size"]:
    """The floor(share size) largest of each row; among equal ones those that stand first."""
    n, size = scores.shape
    # 0.29 * 100 is 28.999999999999996
    count = math.floor(share * size + 1e-9)
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros(n, size, dtype=torch.bool, device=scores.device).scatter(1, chosen, True)


def removed(
    x: Float[Tensor, "n channel *dims"],
    maps: Float[Tensor, "n channel *dims"],
    share: float,
    mean: Float[Tensor, "channel"],
    *,
    squared: bool = True,
    keep: bool = False,
) -> Float[Tensor, "n channel *dims"]:
    """ROAR: the values with the largest ``share`` of scores become their channel's ``mean``; ``keep``: all others do.

    Every value of every channel is ranked by itself, by the square of its map's number or by the number.
    """
    gone = mask(maps, share, squared=squared) != keep
    return torch.where(gone, mean.reshape(1, -1, *[1] * (x.ndim - 2)).to(x), x)


def mask(maps: Float[Tensor, "n *dims"], share: float, *, squared: bool = True) -> Bool[Tensor, "n *dims"]:
    """Which values are among the largest ``share`` of a picture's."""
    scores = (maps.abs() if squared else maps).flatten(1)  # ordered as the squares, of which small ones would vanish
    return ranked(scores, share).view_as(maps)


def pixels(maps: Float[Tensor, "n channel h w"], share: float, *, squared: bool = True) -> Bool[Tensor, "n h w"]:
    """Which pixels are among the largest ``share`` of a picture's, by the sum over their channels, as ROAD ranks."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # in half precision small squares would vanish
    scores = (maps.square() if squared else maps).sum(1)
    return ranked(scores.flatten(1), share).view_as(scores)


def imputed(
    x: Float[Tensor, "n channel h w"], gone: Bool[Tensor, "n h w"], noise: float, rng: torch.Generator
) -> Float[Tensor, "n channel h w"]:
    """ROAD's noisy linear imputation (arXiv:2202.00449, section 4.3): a pixel that is gone is the weighted mean of its
    eight neighbours, those that are gone as well included, which is one linear system a picture; then noise is added.

    At the border the weights of the neighbours that exist are divided by their sum. A picture of which nothing is left
    has no solution: it becomes its channels' means.

    Args:
        noise: deviation of what is added, in the pictures' own units.
    """
    height, width = x.shape[-2:]
    laplacian = _averaging(height, width).to(x)
    out = []
    for picture, hole in zip(x, gone.flatten(1), strict=True):
        flat = picture.flatten(1).clone()
        if hole.all():
            flat[:] = flat.mean(1, keepdim=True)
        elif hole.any():
            system, known = laplacian[hole][:, hole], laplacian[hole][:, ~hole]
            flat[:, hole] = torch.linalg.solve(system, -known @ flat[:, ~hole].T).T
        added = torch.randn(flat.shape, generator=rng, dtype=flat.dtype).to(flat)
        out.append(torch.where(hole, flat + noise * added, flat).view_as(picture))
    return torch.stack(out)


def _averaging(height: int, width: int) -> Float[Tensor, "size size"]:
    """I less the weighted mean over neighbours, in float64; rows sum to 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    weights = torch.zeros(height * width, height * width, dtype=torch.float64)
    here = rows * width + columns
    for (i, j), weight in NEIGHBOURS.items():
        there = (rows + i >= 0) & (rows + i < height) & (columns + j >= 0) & (columns + j < width)
        weights[here[there], (here + i * width + j)[there]] = weight
    return torch.eye(height * width, dtype=torch.float64) - weights / weights.sum(1, keepdim=True)
