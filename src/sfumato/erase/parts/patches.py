"""A patch discriminator of latents."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

WIDTH = 64
"""Channels of the first stage; each of the others has twice as many as the one before."""


class PatchDiscriminator(nn.Sequential):
    """Convolutions of 4x4 that halve the side ``stages`` times, and one more to a logit for each patch.

    Every call is normalised by its own statistics, over all that is in it ("batch") or picture by picture ("group",
    one group), in training as at any other time: none are kept. The first stage is not normalised.

    Args:
        channels: of the latents.
        stages: from 1; four in the published code, for latents of 64x64: the logits are 3x3.
        seed: of the first weights.
    """

    def __init__(self, channels: int, stages: int = 4, norm: Literal["batch", "group"] = "batch", seed: int = 0):
        widths = [channels, *(WIDTH * 2**i for i in range(stages))]
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for i, (n, m) in enumerate(pairwise(widths)):
                layers.append(nn.Conv2d(n, m, 4, stride=2, padding=1))
                if i and norm == "batch":
                    layers.append(nn.BatchNorm2d(m, track_running_stats=False))
                elif i:
                    layers.append(nn.GroupNorm(1, m))
                layers.append(nn.LeakyReLU(0.2))
            layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        super().__init__(*layers)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch 1 rows columns"]:
        return super().forward(x)


def stages_for(side: int) -> int:
    """As many halvings, four at most, as leave a side of 4: 3x3 patches of latents of 64x64 and smaller ones."""
    return max(1, min(4, side.bit_length() - 3))
