"""Projection heads: what stands between a representation and the loss that trains it, and is thrown away afterwards."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

HeadKind = Literal["none", "linear", "mlp", "mlp2", "reweight", "identity"]
CARRIES = 1e-6
"""A weight above this carries something of its coordinate."""


def symmetric_relu(t: Float[Tensor, "*n"], b: Float[Tensor, ""] | float) -> Float[Tensor, "*n"]:
    """ReLU(t - b) - ReLU(-t - b): the identity at b = 0; what is smaller than b in size vanishes."""
    return relu(t - b) - relu(-t - b)


class SymmetricReLU(nn.Module):
    """`symmetric_relu` with a learned b that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return symmetric_relu(t, self.b)


def geometric(dim: int, kappa: float) -> Float[Tensor, "dim"]:
    """kappa^-i for i = 0 ... dim - 1, in float64."""
    return torch.exp(-torch.arange(dim, dtype=torch.float64) * math.log(kappa))


class Reweight(nn.Module):
    """h_i = z_i / kappa^i, nothing of which is trained."""

    weights: Tensor

    def __init__(self, dim: int, kappa: float):
        super().__init__()
        self.register_buffer("weights", geometric(dim, kappa).float())

    @property
    def carried(self) -> int:
        """How many coordinates have a weight above 1e-6."""
        return int((self.weights > CARRIES).sum())

    def forward(self, z: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n dim"]:
        return z * self.weights.to(z.dtype)


def make_head(kind: HeadKind, dim: int, hidden: int, kappa: float) -> nn.Module:
    """A head from ``dim`` numbers to as many; ``hidden`` are those between, of "mlp" and "mlp2"."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(dim, dim)
    if kind == "reweight":
        return Reweight(dim, kappa)
    if kind == "identity":
        first, last = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for layer in (first, last):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(first, SymmetricReLU(), last)
    middle = [nn.Linear(hidden, hidden), nn.ReLU()] if kind == "mlp2" else []
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), *middle, nn.Linear(hidden, dim))
