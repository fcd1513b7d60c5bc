"""Who stays in a population that several objectives judge; all of them are to be small."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def dominated(scores: Float[Tensor, "n objectives"]) -> Bool[Tensor, "n n"]:
    """[i, j]: row i is nowhere worse than row j and somewhere better."""
    one, other = scores[:, None], scores[None]
    return (one <= other).all(-1) & (one < other).any(-1)


def fronts(scores: Float[Tensor, "n objectives"]) -> list[list[int]]:
    """Non-dominated sorting: the rows that nothing dominates, then those that nothing else does, and so on."""
    above, left, found = dominated(scores).tolist(), set(range(len(scores))), []
    while left:
        front = [i for i in sorted(left) if not any(above[j][i] for j in left)]
        found.append(front)
        left -= set(front)
    return found


def crowding(scores: Float[Tensor, "n objectives"]) -> Float[Tensor, "n"]:
    """NSGA-II's crowding distance within one front: the sum over objectives of the gap between a row's neighbours, as
    a share of the whole range; infinite at the ends."""
    n, objectives = scores.shape
    distance = torch.zeros(n, dtype=torch.float64)
    for k in range(objectives):
        order = scores[:, k].argsort(stable=True)
        sorted_, span = scores[order, k].double(), float(scores[:, k].max() - scores[:, k].min())
        distance[order[[0, -1]]] = torch.inf
        if span > 0:
            distance[order[1:-1]] += (sorted_[2:] - sorted_[:-2]) / span
    return distance


def nsga2(scores: Float[Tensor, "n objectives"], count: int) -> list[int]:
    """``count`` rows, the best first: whole fronts, and of the last one those that stand most alone."""
    chosen: list[int] = []
    for front in fronts(scores):
        distance = crowding(scores[front])
        order = distance.argsort(descending=True, stable=True).tolist()
        chosen += [front[i] for i in order]
        if len(chosen) >= count:
            break
    return chosen[:count]


def cars(scores: Float[Tensor, "n objectives"], count: int, rng: torch.Generator) -> list[int]:
    """``count`` rows as CARS chooses (arXiv:1909.04977), as the published code has it.

    For each objective but the first, fronts of (first, it) and of (first, 1 / it): the i-th fronts of all are joined,
    for i = 1, 2 ..., until there are enough; of the last ones by lot. The inverse ones protect large nets, and, where
    the objective is a distance, bad ones; but what is infinite is the worst of the inverse, too.
    """
    rest = [scores[:, [0, k]] for k in range(1, scores.shape[1])]
    over = torch.where(scores.isfinite(), 1 / (scores + 1e-10), scores)
    inverse = [torch.stack([scores[:, 0], over[:, k]], 1) for k in range(1, scores.shape[1])]
    sorted_ = [fronts(pair) for both in zip(rest, inverse, strict=True) for pair in both]
    chosen: list[int] = []
    for stage in range(max(map(len, sorted_))):
        fresh = sorted({i for found in sorted_ if len(found) > stage for i in found[stage]} - set(chosen))
        if len(chosen) + len(fresh) > count:
            lots = torch.randperm(len(fresh), generator=rng)[: count - len(chosen)].tolist()
            fresh = [fresh[i] for i in sorted(lots)]
        chosen += fresh
        if len(chosen) == count:
            break
    return chosen
