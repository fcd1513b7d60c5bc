"""Sines and cosines of points and directions, in octaves, as scene networks are told of cameras."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def octaves(x: Float[Tensor, "*n dim"], count: int, first: int = 0) -> Float[Tensor, "*n encoded"]:
    """sin(2^o pi x), then cos(2^o pi x), for ``count`` octaves o from ``first`` on: 2 * dim * count numbers.

    Each half goes through the dimensions, and for each of them through the octaves.
    """
    speed = 2.0 ** torch.arange(first, first + count, dtype=x.dtype, device=x.device) * math.pi
    angles = (x[..., None] * speed).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def ray_encoding(
    origins: Float[Tensor, "*n 3"], directions: Float[Tensor, "*n 3"], count: int = 15, first: int = -5
) -> Float[Tensor, "*n encoded"]:
    """Where rays begin, in octaves from ``first`` on, and their unit directions, from 0 on: 12 * count numbers."""
    return torch.cat([octaves(origins, count, first), octaves(directions, count)], dim=-1)


def ray_map(
    origins: Float[Tensor, "*n 3"], directions: Float[Tensor, "*n height width 3"], count: int = 15, first: int = -5
) -> Float[Tensor, "*n encoded height width"]:
    """`ray_encoding` for every pixel of pictures, channels first."""
    placed = origins[..., None, None, :].expand(directions.shape)
    return ray_encoding(placed, directions, count, first).movedim(-1, -3)


def pose_encoding(poses: Float[Tensor, "*n 4 4"], count: int = 15, first: int = -5) -> Float[Tensor, "*n encoded"]:
    """Position, forward and up of cameras: 18 * count numbers."""
    place, up, back = poses[..., :3, 3], poses[..., :3, 1], poses[..., :3, 2]
    return torch.cat([octaves(place, count, first), octaves(torch.cat([-back, up], dim=-1), count)], dim=-1)
