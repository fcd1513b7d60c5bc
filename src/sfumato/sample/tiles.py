"""Large pictures in tiles: those that do not touch are sampled together, and later ones grow onto earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from ..noise.denoiser import Denoiser
from .samplers import Generators, Times

Box = tuple[int, int]
"""The upper left corner of a tile."""
BATCH = 8
"""Tiles sampled together at the most."""


@dataclass(frozen=True)
class Tiling:
    """Square tiles of ``side`` pixels on a grid, neighbours of which share ``overlap`` pixels.

    Coloured two by two, so that no two tiles of a colour touch.

    Raises:
        BadInput: an overlap of more than half of the side, or none.
    """

    side: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 < 2 * self.overlap <= self.side:
            raise BadInput(f"tiles of {self.side} pixels overlap by 1 to {self.side // 2}, not by {self.overlap}")

    def padded(self, length: int) -> int:
        """The least length of at least ``length`` that the grid covers exactly."""
        step = self.side - self.overlap
        return self.side + max(0, -(-(length - self.side) // step)) * step

    def groups(self, height: int, width: int) -> list[list[Box]]:
        """The tiles of each of the (at most) four colours, in the order in which they are sampled.

        Args:
            height, width: as `padded` gives them.
        """
        step = self.side - self.overlap
        rows, columns = (range(1 + (n - self.side) // step) for n in (height, width))
        colours = [[(r * step, c * step) for r in rows[i::2] for c in columns[j::2]] for i in (0, 1) for j in (0, 1)]
        return [boxes for boxes in colours if boxes]

    def batches(self, height: int, width: int, batch: int) -> list[list[Box]]:
        """`groups` cut to at most ``batch`` tiles that are sampled together."""
        return [group[i : i + batch] for group in self.groups(height, width) for i in range(0, len(group), batch)]

    def window(self) -> Float[Tensor, "side side"]:
        """The weight of a tile where it is blended: it falls linearly towards the edges, over the overlap; float64."""
        near = torch.arange(self.side, dtype=torch.float64) + 0.5
        ramp = (torch.minimum(near, self.side - near) / self.overlap).clamp(max=1)
        return ramp[:, None] * ramp


def tiled(
    sampler: Callable[..., Tensor],
    denoiser: Callable[[Float[Tensor, "n channel side side"]], Denoiser],
    degraded: Float[Tensor, "1 channel height width"],
    z: Float[Tensor, "1 channel height width"],
    eps: Float[Tensor, "1 channel height width"],
    times: Times,
    tiling: Tiling,
    generator: Generators | None = None,
    batch: int = BATCH,
) -> Float[Tensor, "1 channel height width"]:
    """One large picture, sampled tile by tile (arXiv:2305.18231, the parallel sampling of its large pictures).

    The tiles of a colour are a batch. What a tile shares with finished ones is replaced at every step but the last by
    the finished pixels, noised to the step's time: alpha_t x_done + sigma_t eps; at the end it is blended with them.
    That is the reconstruction of a rule which the paper does not give. Where one batch's memory is enough, the whole
    picture at once is the reference.

    Args:
        sampler: one of `sfumato.sample`, which takes its callback's ``z`` to be its own.
        denoiser: makes the denoiser of tiles from these tiles of the degraded picture.
        degraded: of the `Tiling.padded` size.
        z: the noisy start at ``times[0]``, for all of the picture.
        eps: the noise that known pixels are noised with, for all of the picture.
        generator: one for all, or a list of one.
        batch: tiles sampled together at the most.
    """
    generator = generator[0] if isinstance(generator, list) else generator
    height, width = degraded.shape[-2:]
    window = tiling.window().to(degraded)
    total, weight = torch.zeros_like(degraded), degraded.new_zeros(height, width)
    for boxes in tiling.batches(height, width, batch):
        cut = lambda x, boxes=boxes: torch.cat([x[..., r : r + tiling.side, c : c + tiling.side] for r, c in boxes])
        covered = cut(weight[None, None])
        done, known = cut(total) / covered.clamp(min=1e-12), covered > 0
        own, noise, told = cut(z).clone(), cut(eps), denoiser(cut(degraded))

        def replace(step: int, t: Tensor, x: Tensor, done=done, known=known, noise=noise, told=told) -> None:
            if step < len(times) - 2:
                x.copy_(torch.where(known, told.process.diffuse(done, t, noise), x))

        replace(-1, times[0], own)
        drawn = sampler(told, own, times, generator=generator, callback=replace)
        for (r, c), tile in zip(boxes, drawn, strict=True):
            total[0, :, r : r + tiling.side, c : c + tiling.side] += window * tile
            weight[r : r + tiling.side, c : c + tiling.side] += window
    return total / weight


def grown(x: Float[Tensor, "n channel height width"], height: int, width: int) -> Float[Tensor, "n channel h w"]:
    """``x`` with its last row and column repeated to that size."""
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode="replicate")
