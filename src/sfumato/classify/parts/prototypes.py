"""Prototypes in a latent space: distances, which is nearest to which, and the latents of many pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data.pictures import Pictures, to_tensor

LOOKED_AT = 2000
"""Pictures among which a page looks for the nearest ones."""


def squared_distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """|x|^2 + |y|^2 - 2 x y^T, not below 0."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def some(pictures: Pictures, most: int, seed: int) -> list[int]:
    """Rows of at most so many of these pictures, by chance, in their order."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    return sorted(order[:most].tolist())


@torch.no_grad()
def latents(net: Any, pictures: Pictures, rows: Sequence[int], batch: int) -> Float[Tensor, "n d"]:
    """What ``net.features`` says of these rows, as the network is (training or not), on the CPU."""
    device, found = next(net.parameters()).device, []
    for first in range(0, len(rows), batch):
        x = to_tensor([pictures.picture(row) for row in rows[first : first + batch]])
        found.append(net.features(x.to(device)).float().cpu())
    return torch.cat(found)


def in_colour(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h w"]:
    """Grey pictures with three equal channels; colour ones as they are."""
    return x.expand(-1, 3, -1, -1)
