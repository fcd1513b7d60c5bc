"""How pictures are damaged: one rule of one strength for all attributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.train.draw import step_seed

from .damage import imputed, mask, moved, pixels, removed, unit
from .projector import Projector

Metric = Literal["goar", "roar", "kar", "road"]


@dataclass(frozen=True)
class Ways:
    """A metric's damage to pictures, and what of it a map alone tells.

    Attributes:
        grid: the strengths, from small to large.
        radius: the unit of lengths.
        mean: of each channel.
        project: back to the manifold; None: pictures stay where they were moved to.
        noise_times: the projector's t0 at the smallest and at the largest strength.
        sign: -1: against the map.
        squared: rank by squares.
        noise: on imputed pixels.
        seed: of that noise.
    """

    metric: Metric
    grid: Sequence[float]
    radius: float
    mean: Float[Tensor, "channel"]
    project: Projector | None
    noise_times: tuple[float, float]
    sign: Literal[-1, 1]
    squared: bool
    noise: float
    seed: int

    def damaged(
        self, x: Float[Tensor, "n channel h w"], maps: Float[Tensor, "n channel h w"], strength: float, rows: range
    ) -> Float[Tensor, "n channel h w"]:
        """Pictures as they are at one strength; ``rows`` names them, and each name has noise of its own."""
        if self.metric == "goar":
            made = moved(x, maps, strength, self.radius, self.sign)
            return made if self.project is None else self.project(made, self.time(strength), rows)
        if self.metric == "road":
            gone = pixels(maps, strength, squared=self.squared)
            generators = [torch.Generator().manual_seed(step_seed(self.seed, 2, row)) for row in rows]
            holes = zip(x, gone, generators, strict=True)
            return torch.cat([imputed(p[None], g[None], self.noise, rng) for p, g, rng in holes])
        return removed(x, maps, strength, self.mean, squared=self.squared, keep=self.metric == "kar")

    def time(self, strength: float) -> float:
        """t0 of a strength, linear between the two."""
        low, high = min(self.grid), max(self.grid)
        first, last = self.noise_times
        return first + (last - first) * ((strength - low) / (high - low) if high > low else 0.0)

    def bare(self, maps: Float[Tensor, "n channel h w"]) -> Float[Tensor, "n channel h w"]:
        """What damage could tell of a picture's class if there were no picture: directions, or masks of half."""
        if self.metric == "goar":
            return unit(maps) * maps[0].numel() ** 0.5  # as large as pictures' values
        if self.metric == "road":
            return pixels(maps, 0.5, squared=self.squared)[:, None].expand_as(maps).to(maps) * 2 - 1
        return mask(maps, 0.5, squared=self.squared).to(maps) * 2 - 1
