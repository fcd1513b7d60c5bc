"""Early downsampling that loses nothing: wavelets by lifting, and the layers that put them around a network.

A network between `Entry` and `Exit` is a function of the original pixels; with a wavelet in them nothing of the
picture is out of its reach, since the transform has an exact inverse.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .blocks import group_norm, zeroed

Wavelet = Literal["5/3", "haar"]
Front = Literal["5/3", "haar", "conv"]


def analyse(
    x: Float[Tensor, "batch channel height width"], levels: int = 1, wavelet: Wavelet = "5/3"
) -> Float[Tensor, "batch bands h w"]:
    """Wavelet transform; the four sub-bands of every channel are stacked, so 3 channels become 12, then 48.

    ``"5/3"`` lifts without rounding: d_i = x_{2i+1} - (x_{2i} + x_{2i+2}) / 2, s_i = x_{2i} + (d_{i-1} + d_i) / 4,
    mirrored at the borders. ``"haar"`` is orthonormal: white noise stays white.

    Raises:
        ValueError: the sides are not divisible by 2^levels.
    """
    for _ in range(levels):
        x = torch.cat([part for half in _split(x, -2, wavelet) for part in _split(half, -1, wavelet)], dim=1)
    return x


def synthesise(
    bands: Float[Tensor, "batch bands h w"], levels: int = 1, wavelet: Wavelet = "5/3"
) -> Float[Tensor, "batch channel height width"]:
    """The inverse of `analyse`."""
    for _ in range(levels):
        a, b, c, d = bands.chunk(4, dim=1)
        bands = _merge(_merge(a, b, -1, wavelet), _merge(c, d, -1, wavelet), -2, wavelet)
    return bands


def _split(x: Tensor, dim: int, wavelet: Wavelet) -> tuple[Tensor, Tensor]:
    if x.shape[dim] % 2:
        raise ValueError(f"sides {tuple(x.shape[-2:])} cannot be halved")
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    if wavelet == "haar":
        return (even + odd) / math.sqrt(2), (odd - even) / math.sqrt(2)
    detail = odd - (even + _after(even, dim)) / 2
    return even + (_before(detail, dim) + detail) / 4, detail


def _merge(smooth: Tensor, detail: Tensor, dim: int, wavelet: Wavelet) -> Tensor:
    if wavelet == "haar":
        even, odd = (smooth - detail) / math.sqrt(2), (smooth + detail) / math.sqrt(2)
    else:
        even = smooth - (_before(detail, dim) + detail) / 4
        odd = detail + (even + _after(even, dim)) / 2
    return torch.stack([even, odd], dim).flatten(dim - 1, dim)


def _after(x: Tensor, dim: int) -> Tensor:
    """x_{i+1}; behind the last, the last: the even samples mirrored at x_{n-1}, the last odd one."""
    return torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, x.shape[dim] - 1, 1)], dim)


def _before(x: Tensor, dim: int) -> Tensor:
    """x_{i-1}; before the first, the first: the odd samples mirrored at x_0."""
    return torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, x.shape[dim] - 1)], dim)


class Entry(nn.Module):
    """From pixels to the first feature map, ``factor`` (1, 2, 4 ...) times smaller: wavelet bands, or patches."""

    def __init__(self, in_channels: int, channels: int, factor: int = 1, front: Front = "5/3"):
        super().__init__()
        self.levels, self.front = levels_of(factor), front
        if front == "conv" and factor > 1:
            self.conv = nn.Conv2d(in_channels, channels, factor, stride=factor)
        else:
            self.conv = nn.Conv2d(in_channels * factor**2, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch features h w"]:
        return self.conv(x if self.front == "conv" else analyse(x, self.levels, self.front))


class Exit(nn.Module):
    """From the last feature map back to pixels; all its weights begin at zero."""

    def __init__(self, channels: int, out_channels: int, factor: int = 1, front: Front = "5/3"):
        super().__init__()
        self.levels, self.front = levels_of(factor), front
        self.norm = group_norm(channels)
        if front == "conv" and factor > 1:
            self.conv = zeroed(nn.ConvTranspose2d(channels, out_channels, factor, stride=factor))
        else:
            self.conv = zeroed(nn.Conv2d(channels, out_channels * factor**2, 3, padding=1))

    def forward(self, x: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch channel height width"]:
        x = self.conv(F.silu(self.norm(x)))
        return x if self.front == "conv" else synthesise(x, self.levels, self.front)


def levels_of(factor: int) -> int:
    """log2(factor).

    Raises:
        BadInput: ``factor`` is no power of two.
    """
    levels = factor.bit_length() - 1
    if factor < 1 or 1 << levels != factor:
        raise BadInput(f"pictures can be made 1, 2, 4 ... times smaller at the entry, not {factor} times")
    return levels
