"""Schedules of jumps: golden-section search, hierarchical splitting on a grid, and the schedules' files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from ..files import write_json
from ..foreign import read_json
from .klub import Kind
from .tokens import CLEANEST

Bracket = Literal["official", "textbook"]
PHI = 1.618
"""As published: three decimals."""


def golden_section(
    f: Callable[[float], float], a: float, c: float, tolerance: float, bracket: Bracket = "official", probes: int = 32
) -> tuple[float, dict[float, float]]:
    """Where f is least in [a, c], of all points at which it was evaluated, and these with their values.

    Begins with b = a + (c - a) / (1 + PHI), and probes the larger of [a, b] and [b, c] until c - a <= ``tolerance``.
    Where a probe is better than b, it becomes b, and "official" leaves both ends where they are, as the published code
    does; "textbook" moves the far end to the old b, and needs fewer probes. Else the probe becomes the end of its side.
    A narrow or reversed bracket has a, b and c only.
    """
    b = a + (c - a) / (1 + PHI)
    seen: dict[float, float] = {}
    for x in (a, b, c):
        seen.setdefault(x, f(x))
    for _ in range(probes):
        if c - a <= tolerance:
            break
        left = b - a > c - b
        x = b - (b - a) / (1 + PHI) if left else b + (c - b) / (1 + PHI)
        value = seen[x] if x in seen else f(x)  # "official" comes to the same point again
        seen[x] = value
        if value < seen[b]:
            if bracket == "textbook":
                a, c = (a, b) if left else (b, c)
            b = x
        elif left:
            a = x
        else:
            c = x
    return min(seen, key=seen.__getitem__), seen


def widened(indices: Sequence[int], last: int) -> list[int]:
    """Increasing ``indices`` from 0 to ``last`` moved until neighbours are at least 2 apart, as far as that goes."""
    s = list(indices)
    for i in range(len(s) - 1):
        if s[i + 1] - s[i] < 2:
            s[i + 1] = min(s[i] + 2, last)
    for i in range(len(s) - 1, 0, -1):
        if s[i] - s[i - 1] < 2:
            s[i - 1] = max(s[i] - 2, 0)
    return s


def increasing(indices: Sequence[int]) -> list[int]:
    """``indices`` moved forwards until each is at least 1 after the one before."""
    s = list(indices)
    for i in range(len(s) - 1):
        if s[i + 1] - s[i] < 1:
            s[i + 1] = s[i] + 1
    return s


def hierarchy(
    split: Callable[[int, int], tuple[int, float]], steps: int, last: int
) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
    """Indices of the schedules in 1, 2, 4 ... ``steps`` steps, from 0 to ``last``, and the gain of each split.

    Every interval of a level is split by itself. Before that, intervals narrower than 2 are widened, which changes the
    schedule of the level just finished, too.

    Args:
        split: (index, next index) -> the index between at which the split gains most, and the gain.

    Raises:
        BadInput: ``steps`` is no power of two, or more than the grid has.
    """
    if steps < 1 or steps & (steps - 1):
        raise BadInput(f"schedules are split in halves, so give a power of two for the steps, not {steps}")
    if steps > last:
        raise BadInput(f"a grid of {last} steps (or a text of {last} tokens) has no schedule of {steps}: give fewer")
    levels, gains = {1: [0, last]}, {1: [0.0]}
    n = 1
    while n < steps:
        coarse = widened(levels[n], last)
        if min(b - a for a, b in pairwise(coarse)) < 2 or (coarse[0], coarse[-1]) != (0, last):
            raise BadInput(f"{2 * n} steps do not fit between {last + 1} points of the grid: take a finer one")
        levels[n] = coarse
        found = [split(a, b) for a, b in pairwise(coarse)]
        fine = [i for a, (middle, _) in zip(coarse, found, strict=False) for i in (a, middle)] + [last]
        n *= 2
        levels[n], gains[n] = increasing(fine), [gain for _, gain in found]
    return levels, gains


@dataclass(frozen=True)
class JumpSchedule:
    """The schedules of one model for 1, 2, 4 ... steps, from one search.

    Attributes:
        indices: by number of steps, places in ``grid``, increasing from 0.
        grid: times from 1 to 1e-5; for "k_gillespie" the numbers of decoded tokens 0, 1, ... D.
        kind: the sampler that they are for.
        gains: by number of steps, what each split gained (KLUB).
        model: a hash of the model's weights, or what else identifies it.
        settings: how they were searched.
    """

    indices: Mapping[int, Sequence[int]]
    grid: Sequence[float]
    kind: Kind
    gains: Mapping[int, Sequence[float]] = field(default_factory=dict)
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def times(self, steps: int) -> Float[Tensor, "steps+1"]:
        """The times of a schedule, or for "k_gillespie" the numbers of decoded tokens.

        Raises:
            BadInput: there is none in so many steps.
        """
        if steps not in self.indices:
            raise BadInput(f"there are schedules for {', '.join(map(str, self.indices))} steps, and none for {steps}")
        chosen = [self.grid[i] for i in self.indices[steps]]
        return torch.tensor(chosen, dtype=torch.int64 if self.kind == "k_gillespie" else torch.float64)

    def save(self, file: str | Path, overwrite: bool = False) -> Path:
        """Write it as JSON, whole or not at all."""
        write_json(file, asdict(self), overwrite)
        return Path(file)

    @classmethod
    def load(cls, file: str | Path, model: str | None = None) -> JumpSchedule:
        """What `save` wrote.

        Args:
            model: what identifies the model that is to be sampled; None does not compare.

        Raises:
            BadInput: no schedule, or that of another model.
        """
        shape = {"indices": dict, "grid": list, "kind": str, "gains": dict, "model": str, "settings": dict}
        said = read_json(Path(file), shape, "search the schedule again")
        try:
            indices = {int(n): [index(i) for i in s] for n, s in said["indices"].items()}
            gains = {int(n): [float(g) for g in s] for n, s in said["gains"].items()}
            grid = [float(t) for t in said["grid"]]
        except (TypeError, ValueError) as error:
            raise BadInput(f"{file} holds no schedule that can be read: search it again") from error
        ends = [0, len(grid) - 1]
        if said["kind"] == "k_gillespie":
            ordered = grid == [float(k) for k in range(len(grid))]
        else:
            ordered = said["kind"] in ("euler", "tau_leaping") and all(1 >= a > b >= 0 for a, b in pairwise(grid))
        sound = ordered and bool(indices) and all(
            len(s) == n + 1 and [s[0], s[-1]] == ends and all(a < b for a, b in pairwise(s)) for n, s in indices.items()
        )
        if not sound:
            raise BadInput(f"{file} holds a schedule that does not run from noise to data: search it again")
        if model is not None and said["model"] != model:
            raise BadInput(
                f"{file} holds the schedule of another model ({said['model'][:12] or 'unnamed'}, not {model[:12]}): "
                "search one for this"
            )
        return cls(indices, grid, said["kind"], gains, said["model"], said["settings"])


def grid_of(points: int) -> list[float]:
    """``points`` + 1 equally spaced times from 1 to 1e-5."""
    return torch.linspace(1.0, CLEANEST, points + 1, dtype=torch.float64).tolist()
