"""A mark in a picture's pixels, written into its cosine coefficients and read without the original (QIM).

Chen and Wornell's quantisation index modulation (2001): each of eight low coefficients of every 8x8 block of luma is
moved to the nearest point of a lattice of step `STEP`, shifted by half a step where its bit is 1 and by a dither that
the key fixes. A number of 16 bits (32 from 256 pixels a side on) is repeated over all coefficients in keyed order. It
outlives rounding and JPEG of usual quality; cropping, turning, and whoever sets out to remove it destroy it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

STEP = 16.0
"""Distance of two points of the lattice of one bit, in levels of 255 of the orthonormal cosine transform."""
CELLS = ((0, 2), (2, 0), (1, 1), (1, 2), (2, 1), (0, 3), (3, 0), (2, 2))
"""Which coefficients of a block carry the mark: low enough to outlive JPEG, not the lowest, which the eye follows."""
KEY = 0x5F0A7E
"""Seed of order and dither. It is public: the mark says where a picture is from and keeps no secret."""
SIGNIFICANT = 1e-4
"""p-value below which a picture counts as marked."""
LEAST = 16
"""Least side of a picture that can be marked, in pixels."""
TRIES = 400
"""Projections in turn on lattice and range of values before a picture is given up."""
_LUMA = np.array([0.299, 0.587, 0.114])


class MarkFailed(RuntimeError):
    """A mark was not read back from a picture into which it was written; the picture must not leave."""


@dataclass(frozen=True)
class Reading:
    """What is read from a picture.

    Attributes:
        payload: the number that its coefficients say by majority.
        bits: of how many bits.
        votes: coefficients that were asked.
        agreeing: those that agree with ``payload``.
        p_value: a bound on how likely a picture without a mark agrees so well with any number at all.
    """

    payload: int
    bits: int
    votes: int
    agreeing: int
    p_value: float

    @property
    def marked(self) -> bool:
        return self.p_value < SIGNIFICANT


def bits_for(height: int, width: int) -> int:
    """Bits of the number in a picture of this size: 16, from 256 pixels a side on 32."""
    return 32 if min(height, width) >= 256 else 16


def embed(pixels: np.ndarray, payload: int) -> np.ndarray:
    """The picture (height, width, 3), uint8, with a number in it; read back before it is returned.

    Raises:
        BadInput: not such an array, one with a side below `LEAST`, a number that has too many bits.
        MarkFailed: the mark is not read back.
    """
    _check(pixels)
    bits = bits_for(*pixels.shape[:2])
    if not 0 <= payload < 2**bits:
        raise BadInput(f"a picture of this size holds a number below 2**{bits}, got {payload}")
    x = pixels.astype(np.float64)
    coefficients = _coefficients(x)
    which, dither = _plan(len(coefficients), bits)
    said = (payload >> which) & 1
    offset = dither + STEP / 2 * said
    target = np.rint((coefficients - offset) / STEP) * STEP + offset
    for _ in range(TRIES):  # both sets are convex: projecting on them in turn ends in both
        error = target - _coefficients(x)
        if np.abs(error).max() < STEP / 32:
            break
        x = np.clip(x + 1.5 * _picture(error, x.shape[:2])[..., None], 0, 255)
    made = np.rint(x).astype(np.uint8)
    require(made, payload)
    return made


def require(pixels: np.ndarray, payload: int) -> None:
    """Refuse a picture from which ``payload`` is not read.

    Raises:
        MarkFailed: another number, or none that is significant.
    """
    found = read(pixels)
    if found.payload != payload or not found.marked:
        raise MarkFailed(
            f"the mark was not read back from the picture ({found.agreeing} of {found.votes} coefficients agree): "
            "it was neither returned nor written; draw it larger, or with another seed"
        )


def read(pixels: np.ndarray) -> Reading:
    """What the coefficients of a picture (height, width, 3), uint8, say; one that was resized, in its first size.

    The p-value is 2**bits P(Binomial(votes, 1/2) >= agreeing): the union over all numbers that could have been found.

    Raises:
        BadInput: not such an array, or too small a one.
    """
    _check(pixels)
    bits = bits_for(*pixels.shape[:2])
    coefficients = _coefficients(pixels.astype(np.float64))
    which, dither = _plan(len(coefficients), bits)
    phase = np.mod(coefficients - dither, STEP) / STEP  # 0 or 1: bit 0; 1/2: bit 1
    ones = (np.abs(phase - 0.5) < 0.25).astype(int)
    sure = -np.cos(2 * np.pi * phase)  # how near to a point of either lattice
    payload = sum(1 << k for k in range(bits) if sure[which == k].sum() > 0)
    agreeing = int((ones == ((payload >> which) & 1)).sum())
    return Reading(payload, bits, len(which), agreeing, min(1.0, 2.0**bits * tail(len(which), agreeing)))


def tail(n: int, k: int) -> float:
    """P(Binomial(n, 1/2) >= k)."""
    return float(sum(math.comb(n, j) for j in range(k, n + 1)) / 2**n) if n <= 4096 else _chernoff(n, k)


def _chernoff(n: int, k: int) -> float:
    """An upper bound on the tail, for many votes."""
    return math.exp(-2 * n * max(0.0, k / n - 0.5) ** 2)


def payload_of(*told: Any, bits: int) -> int:
    """A number of so many bits that follows from what is told, and says nothing of it."""
    return int.from_bytes(hashlib.blake2b(repr(told).encode(), digest_size=8).digest(), "little") % 2**bits


def payloads(marked: Mapping[str, Any], asked: Sequence[Any], seeds: Sequence[int], side: int) -> list[int]:
    """The number of each picture of a draw by a pipeline whose pictures are ``marked``."""
    said = [x if isinstance(x, str) else "" for x in asked]
    bits = bits_for(side, side)
    return [payload_of(sorted(marked), x, seed, bits=bits) for x, seed in zip(said, seeds, strict=True)]


def marked_pictures(
    pictures: Float[Tensor, "n 3 height width"], numbers: Sequence[int]
) -> Float[Tensor, "n 3 height width"]:
    """Pictures in [0, 1], in 256 levels and each with its number in it.

    Raises:
        MarkFailed: a mark is not read back from one of them.
    """
    made = []
    for x, number in zip(pictures, numbers, strict=True):
        pixels = embed(as_levels(x), number)
        made.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    return torch.stack(made)


def as_levels(picture: Float[Tensor, "3 height width"]) -> np.ndarray:
    """A picture in [0, 1] as (height, width, 3), uint8."""
    return (picture.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def check_pixels(pixels: np.ndarray) -> None:
    """Refuse what is no picture.

    Raises:
        BadInput: not (height, width, 3), or not uint8.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise BadInput(f"a picture with a mark is (height, width, 3) in uint8, not {pixels.shape} in {pixels.dtype}")


def _check(pixels: np.ndarray) -> None:
    check_pixels(pixels)
    if min(pixels.shape[:2]) < LEAST:
        raise BadInput(f"a picture needs {LEAST} pixels a side to hold a mark, got {pixels.shape[1]}x{pixels.shape[0]}")


@cache
def _basis() -> np.ndarray:
    """The orthonormal cosine transform of 8 numbers: rows are frequencies."""
    k, n = np.mgrid[:8, :8]
    return np.sqrt(np.where(k == 0, 1, 2) / 8) * np.cos(np.pi * (2 * n + 1) * k / 16)


def _coefficients(x: np.ndarray) -> np.ndarray:
    """The coefficients that carry the mark, those of a block adjacent."""
    height, width = x.shape[0] // 8 * 8, x.shape[1] // 8 * 8
    blocks = (x[:height, :width] @ _LUMA).reshape(height // 8, 8, width // 8, 8).swapaxes(1, 2)
    rows, columns = zip(*CELLS, strict=True)
    return (_basis() @ blocks @ _basis().T)[..., list(rows), list(columns)].reshape(-1)


def _picture(coefficients: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The picture of which these are `_coefficients` and all others zero."""
    height, width = shape[0] // 8, shape[1] // 8
    rows, columns = zip(*CELLS, strict=True)
    blocks = np.zeros((height, width, 8, 8))
    blocks[..., list(rows), list(columns)] = coefficients.reshape(height, width, len(CELLS))
    made = np.zeros(tuple(shape))
    inside = (_basis().T @ blocks @ _basis()).swapaxes(1, 2).reshape(height * 8, width * 8)
    made[: height * 8, : width * 8] = inside
    return made


def _plan(n: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Which bit each coefficient says, and its dither."""
    rng = np.random.default_rng(KEY)
    return rng.permutation(n) % bits, rng.uniform(0, STEP, n)
