"""A game of n players: the worth of every alliance, and what each player's part of it is. Pure functions.

An alliance is a number whose bit i says that player i takes part; tables have its worth in row ``alliance``, with any
further dimensions (pictures, seeds, resamples), in which everything here is linear.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput


def players_of(worth: Float[Tensor, "alliances *rest"]) -> int:
    """How many players a whole table is about.

    Raises:
        BadInput: its number of rows is no power of two.
    """
    n = len(worth).bit_length() - 1
    if n < 0 or len(worth) != 1 << n:
        raise BadInput(f"a table of all alliances has a power of two of rows, not {len(worth)}")
    return n


def shapley(worth: Float[Tensor, "alliances *rest"]) -> Float[Tensor, "players *rest"]:
    """v_i = sum over L without i of |L|! (n - |L| - 1)! / n! [U(L + i) - U(L)], the Shapley value (2311.12847, eq. 5).

    In the type of ``worth``; the values sum to U(all) - U(none).
    """
    n = players_of(worth)
    alliances = torch.arange(1 << n, device=worth.device)
    sizes = sum(((alliances >> i) & 1 for i in range(n)), torch.zeros_like(alliances))
    weights = worth.new_tensor([_weight(n, k) for k in range(n)])
    found = []
    for i in range(n):
        without = alliances[(alliances >> i) & 1 == 0]
        weight = weights[sizes[without]].view(-1, *[1] * (worth.ndim - 1))
        found.append((weight * (worth[without | (1 << i)] - worth[without])).sum(0))
    return torch.stack(found) if found else worth[:0]


def _weight(n: int, k: int) -> float:
    return 1 / (n * math.comb(n - 1, k))


def leave_one_out(worth: Float[Tensor, "alliances *rest"]) -> Float[Tensor, "players *rest"]:
    """v_i = U(all) - U(all without i)."""
    n = players_of(worth)
    everyone = (1 << n) - 1
    return torch.stack([worth[everyone] - worth[everyone ^ (1 << i)] for i in range(n)]) if n else worth[:0]


def normalised(values: Float[Tensor, "players *rest"]) -> Float[Tensor, "players *rest"]:
    """v_i / sum_j |v_j|: signed shares whose absolute values sum to 1; all zero where every value is."""
    total = values.abs().sum(0)
    return torch.where(total > 0, values / total.clamp_min(torch.finfo(values.dtype).tiny), torch.zeros_like(values))


def table(measured: Mapping[Iterable[str], float], players: Sequence[str]) -> Float[Tensor, "alliances"]:
    """The whole table, in float64, of worths by the players' names.

    Raises:
        BadInput: an unknown player, or alliances that are missing, which are named.
    """
    rows: dict[int, float] = {}
    for names, value in measured.items():
        rows[alliance(names, players)] = float(value)
    if missing := [a for a in range(1 << len(players)) if a not in rows]:
        words = "; ".join(" + ".join(members(a, players)) or "none of them" for a in missing[:4])
        raise BadInput(f"{len(missing)} of {1 << len(players)} alliances were not measured: {words}; measure them too")
    return torch.tensor([rows[a] for a in range(1 << len(players))], dtype=torch.float64)


def alliance(names: Iterable[str], players: Sequence[str]) -> int:
    """The number of the alliance of these players.

    Raises:
        BadInput: a name that is no player's.
    """
    names = [names] if isinstance(names, str) else list(names)
    if strangers := [name for name in names if name not in players]:
        raise BadInput(f"{strangers[0]!r} is none of the parts {', '.join(players)}")
    return sum(1 << players.index(name) for name in set(names))


def members(alliance: int, players: Sequence[str]) -> list[str]:
    """The names of those that take part."""
    return [name for i, name in enumerate(players) if alliance >> i & 1]


def dividends(measured: Mapping[Iterable[str], float], players: Sequence[str]) -> Float[Tensor, "players"]:
    """v_i = sum over measured L with i of m(L) / |L|, in float64: the published code, not the paper's formula.

    It takes for the worth of an alliance the sum of what was measured of it and of all within it, so that the measured
    numbers act as Harsanyi dividends, and what was not measured counts as 0. It overcounts.
    """
    rows = torch.zeros(1 << len(players), dtype=torch.float64)
    for names, value in measured.items():
        rows[alliance(names, players)] += value
    return as_dividends(rows)


def as_dividends(worth: Float[Tensor, "alliances *rest"]) -> Float[Tensor, "players *rest"]:
    """`dividends` of a whole table: v_i = sum over L with i of U(L) / |L|."""
    n = players_of(worth)
    each = [[a for a in range(1 << n) if a >> i & 1] for i in range(n)]
    sizes = [worth.new_tensor([a.bit_count() for a in some]).view(-1, *[1] * (worth.ndim - 1)) for some in each]
    found = [(worth[some] / size).sum(0) for some, size in zip(each, sizes, strict=True)]
    return torch.stack(found) if found else worth[:0]


# By sampling


def orders(n: int, pairs: int, rng: torch.Generator) -> list[tuple[int, ...]]:
    """``pairs`` random orders of n players, each followed by its reverse."""
    drawn = [tuple(torch.randperm(n, generator=rng).tolist()) for _ in range(pairs)]
    return [order for one in drawn for order in (one, one[::-1])]


def visited(some: Sequence[Sequence[int]]) -> list[int]:
    """The alliances whose worth these orders ask for, each once, in rising order."""
    seen = {0}
    for order in some:
        seen.update(itertools.accumulate((1 << i for i in order), lambda a, b: a | b))
    return sorted(seen)


def sampled_shapley(
    worth: Mapping[int, Tensor] | Callable[[int], Tensor], some: Sequence[Sequence[int]], antithetic: bool = True
) -> tuple[Float[Tensor, "players *rest"], Float[Tensor, "players *rest"]]:
    """The mean marginal gains along orders, and their standard error (over pairs, as `orders` gives them).

    Unbiased for random orders, and over all n! of them the Shapley value itself. The gains of each order sum to
    U(all) - U(none), and so do the means. The error is NaN of a single order or pair.
    """
    ask = worth if callable(worth) else worth.__getitem__
    known: dict[int, Tensor] = {}

    def at(a: int) -> Tensor:
        if a not in known:
            known[a] = ask(a)
        return known[a]

    gains = []
    for order in some:
        now, own = 0, [torch.empty(0)] * len(order)
        for i in order:
            own[i] = at(now | 1 << i) - at(now)
            now |= 1 << i
        gains.append(torch.stack(own))
    found = torch.stack(gains)
    apart = found.unflatten(0, (-1, 2)).mean(1) if antithetic and len(found) % 2 == 0 else found
    error = apart.std(0) / len(apart) ** 0.5 if len(apart) > 1 else torch.full_like(apart[0], math.nan)
    return found.mean(0), error
