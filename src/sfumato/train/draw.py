"""Randomness of a training step that does not depend on how its batch is cut over processes and micro-batches.

The rows of a step's batch are numbered from 0. A `Share` is a run of them together with the generator that belongs to
it, and the functions here draw for the *whole* batch and return the rows of the share: so the pictures, times and
noise of step i are the same on one process, on eight, and with gradients accumulated. A recipe that draws with torch
itself (``torch.rand(n, generator=rng)``) is right too, and resumes to the same bits, but what it draws depends on the
number of shares. All functions take a plain ``torch.Generator`` as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 2**16
"""Normal numbers that are drawn at once, so that a share need not draw the noise of the whole batch."""


def step_seed(*numbers: int) -> int:
    """A seed below 2**63 that depends on all ``numbers``, e.g. run, step and stream, in every bit.

    Torch's generator on the CPU reads the low 32 bits of a seed and nothing else.
    """
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def cut(total: int, parts: int) -> list[range]:
    """``total`` rows in ``parts`` runs whose lengths differ by at most one."""
    return [range(total * i // parts, total * (i + 1) // parts) for i in range(parts)]


class Share(torch.Generator):
    """Rows of one step's batch, and their randomness; as a generator, it is seeded by its first row as well.

    Attributes:
        rows: the places of these rows in the batch.
        total: rows of the whole batch.
    """

    def __new__(cls, *args: object) -> Share:
        return super().__new__(cls)

    def __init__(self, key: Sequence[int], rows: range, total: int):
        """``key`` says which run, step and stream of draws these are."""
        self.rows, self.total, self._key, self._draws = rows, total, tuple(key), 0
        self.manual_seed(step_seed(*key, rows.start))

    def whole(self) -> Share:
        """All rows of the batch, with the same randomness from its start: what the other shares draw."""
        return Share(self._key, range(self.total), self.total)

    def generators(self, n: int, blocks: range) -> list[torch.Generator]:
        """One generator for each of ``blocks`` of the next draw, which must be for the rows of this share.

        Raises:
            ValueError: ``n`` is another number of rows.
        """
        if n != len(self.rows):
            raise ValueError(f"a draw for {n} rows in a share of {len(self.rows)}: reshape what a row needs instead")
        self._draws += 1
        return [torch.Generator().manual_seed(step_seed(*self._key, -self._draws, block)) for block in blocks]


def integers(high: int, n: int, rng: torch.Generator) -> Int[Tensor, "n"]:
    """``n`` whole numbers, uniform in [0, high)."""
    whole, rows, total = _whole(n, rng)
    return torch.randint(high, (total,), generator=whole)[rows]


def grouped(high: int, n: int, group: int, rng: torch.Generator) -> Int[Tensor, "n"]:
    """``n`` whole numbers in [0, high) that come in runs: ``group`` neighbours, the first a multiple of ``group``.

    A run at the end of the whole batch, or of ``high``, may be cut short or wrap around.
    """
    whole, rows, total = _whole(n, rng)
    first = torch.randint(-(-high // group), (-(-total // group),), generator=whole) * group
    return ((first[:, None] + torch.arange(group)).flatten()[:total] % high)[rows]


def uniform(n: int, rng: torch.Generator) -> Float[Tensor, "n"]:
    """``n`` numbers, uniform in [0, 1)."""
    whole, rows, total = _whole(n, rng)
    return torch.rand(total, generator=whole)[rows]


def strata(n: int, rng: torch.Generator) -> Float[Tensor, "n"]:
    """``n`` numbers in [0, 1), float64: one in each N-th of the interval, for the N rows of the whole batch.

    Each is uniform by itself; a mean over the batch varies less (arXiv:2107.00630, appendix I.1).
    """
    whole, rows, total = _whole(n, rng)
    places = torch.randperm(total, generator=whole)
    return ((places + torch.rand(total, generator=whole, dtype=torch.float64)) / total)[rows]


def normal(shape: Sequence[int], rng: torch.Generator) -> Float[Tensor, "*shape"]:
    """Standard normal numbers, float32; the first of ``shape`` is the rows."""
    if not isinstance(rng, Share):
        return torch.randn(tuple(shape), generator=rng)
    n, row = shape[0], tuple(shape[1:])
    size = max(1, BLOCK // max(1, math.prod(row)))
    first, end = rng.rows.start, rng.rows.stop
    blocks = range(first // size, -(-end // size))
    drawn = [
        torch.randn((min(size, rng.total - block * size), *row), generator=generator)
        for block, generator in zip(blocks, rng.generators(n, blocks), strict=True)
    ]
    start = first - blocks.start * size
    return torch.cat(drawn)[start : start + n] if len(drawn) > 1 else drawn[0][start : start + n]


@contextmanager
def same_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout in the block draws its masks from ``seed``; what is drawn elsewhere is not touched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _whole(n: int, rng: torch.Generator) -> tuple[torch.Generator, slice, int]:
    """The generator of the whole batch's draw, the rows of it that were asked for, and how many it has."""
    if not isinstance(rng, Share):
        return rng, slice(None), n
    (whole,) = rng.generators(n, range(1))
    return whole, slice(rng.rows.start, rng.rows.stop), rng.total
