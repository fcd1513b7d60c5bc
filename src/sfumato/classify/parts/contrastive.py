"""Losses of two views of each picture."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def spectral(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """-2 E[h(x+) . h(x+')] + E[(h(x) . h(y))^2], x and y being views of different pictures (arXiv:2106.04156)."""
    n = len(first)
    apart = (first @ second.T).square()
    return -2 * (first * second).sum(1).mean() + (apart.sum() - apart.diagonal().sum()) / (n * (n - 1))


def info_nce(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], temperature: float) -> Float[Tensor, ""]:
    """Which of all other views is the same picture's? SimCLR's loss, of cosines over ``temperature``."""
    h = normalize(torch.cat([first, second]), dim=1)
    n = len(first)
    likeness = (h @ h.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool, device=h.device), -torch.inf)
    return cross_entropy(likeness, torch.arange(2 * n, device=h.device).roll(n))


def sup_con(h: Float[Tensor, "n d"], y: Int[Tensor, "n"], temperature: float) -> Float[Tensor, ""]:
    """The mean over rows of the log-sum-exp of cosines to all others minus their mean to those of the same class.

    Cosines are over ``temperature``. Every row needs another of its class, as a second view is.
    """
    h = normalize(h, dim=1)
    itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
    likeness = h @ h.T / temperature
    same = (y[:, None] == y) & ~itself
    near = (likeness * same).sum(1) / same.sum(1)
    return (likeness.masked_fill(itself, -torch.inf).logsumexp(1) - near).mean()
