"""ELIC: the autoencoder of a picture codec, with a hyper-prior, groups of channels and a checkerboard of contexts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.errors import BadInput

from .entropy import (
    HALF,
    CheckerboardConv2d,
    FactorisedPrior,
    bits,
    checkerboard,
    gaussian_counts,
    gaussian_likelihood,
    scale_index,
    scale_table,
    ste_round,
    wide,
)
from .exact import exact, on_grid

LARGEST = 1023
"""Latents and their centres are clipped to this before they are coded."""
Net = Callable[[nn.Module, Tensor], Tensor]
Choose = Callable[[slice, Tensor, Tensor, Tensor], Tensor]


class Coder(Protocol):
    """What writes whole numbers, reads them back, or counts their bits."""

    def code(
        self, values: Int[Tensor, "n"] | None, rows: Int[Tensor, "n"], counts: Int[Tensor, "row width"]
    ) -> Int[Tensor, "n"]:
        """The numbers, of which each lies around 0 as the table in its row says; None where they are to be read."""
        ...


def conv(inside: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the side, or divides it by ``stride``."""
    return nn.Conv2d(inside, out, kernel, stride, kernel // 2)


def deconv(inside: int, out: int, kernel: int, stride: int = 1) -> nn.ConvTranspose2d:
    """Its transpose."""
    return nn.ConvTranspose2d(inside, out, kernel, stride, kernel // 2, stride - 1)


class Bottleneck(nn.Module):
    """x plus 1x1, 3x3 and 1x1 convolutions with half the channels inside: ELIC's residual bottleneck block."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.inside = nn.Sequential(
            conv(channels, half, 1), nn.ReLU(), conv(half, half, 3), nn.ReLU(), conv(half, channels, 1)
        )

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        return x + self.inside(x)


class Gated(nn.Module):
    """x + a sigmoid(b), a and b stacks of three bottlenecks with a ReLU: the "attention" of arXiv:2001.01568."""

    def __init__(self, channels: int):
        super().__init__()
        unit = lambda: nn.Sequential(Bottleneck(channels), nn.ReLU())
        self.a = nn.Sequential(unit(), unit(), unit())
        self.b = nn.Sequential(unit(), unit(), unit(), conv(channels, channels, 1))

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        return x + self.a(x) * torch.sigmoid(self.b(x))


class Elic(ModelMixin, ConfigMixin):
    """The networks of ELIC (arXiv:2203.10886) and what their latents cost.

    Pictures in [-1, 1] become latents y at 1/16 of the side, and these z at 1/64. y is coded in groups of channels,
    each in two passes over a checkerboard; mean and scale of every value are told from z, the groups before, and the
    first pass. What tells them runs in fixed point (`sfumato.nets.exact`) where bytes are written or read.

    Sizes, kernels and activations are those of CompressAI's ``Elic2022Official``. Differs from it: the quantiles of the
    factorised prior but the median are not learned (its tables are of one width, see `freeze`).

    Args:
        width: channels of the networks (N of the paper).
        latent: channels of y (M); ``groups`` sum to it.
        groups: channels of each group, coded one after the other.
        context: channels inside of what one group tells the next.
        blocks: residual blocks after each of the first three convolutions.
        attention: gates behind the second and the fourth convolution.
        hyper: without, y has a factorised prior and there is no z: a small codec for tests.

    Raises:
        BadInput: groups that do not sum to ``latent``, or channels too few to be halved.
    """

    prior_counts: Tensor
    scales: Tensor
    scale_counts: Tensor

    @register_to_config
    def __init__(
        self,
        width: int = 192,
        latent: int = 320,
        groups: tuple[int, ...] = (16, 16, 32, 64, 192),
        context: tuple[int, int] = (224, 128),
        blocks: int = 3,
        attention: bool = True,
        hyper: bool = True,
    ):
        super().__init__()
        if hyper and sum(groups) != latent:
            raise BadInput(f"the groups {tuple(groups)} sum to {sum(groups)} channels: let them sum to latent={latent}")
        if min(width, latent) < 2:
            raise BadInput("a codec needs at least two channels")
        residual = lambda: [Bottleneck(width) for _ in range(blocks)]
        gate = lambda channels: [Gated(channels)] if attention else []
        self.g_a = nn.Sequential(
            conv(3, width, 5, 2), *residual(), conv(width, width, 5, 2), *residual(), *gate(width),
            conv(width, width, 5, 2), *residual(), conv(width, latent, 5, 2), *gate(latent),
        )  # fmt: skip
        self.g_s = nn.Sequential(
            *gate(latent), deconv(latent, width, 5, 2), *residual(), deconv(width, width, 5, 2), *gate(width),
            *residual(), deconv(width, width, 5, 2), *residual(), deconv(width, 3, 5, 2),
        )  # fmt: skip
        self.prior = FactorisedPrior(width if hyper else latent)
        if hyper:
            self._hyper(width, latent, tuple(groups), tuple(context))
        channels = width if hyper else latent
        self.register_buffer("prior_counts", torch.zeros(channels, 2 * HALF + 2, dtype=torch.int32))

    def _hyper(self, width: int, latent: int, groups: tuple[int, ...], context: tuple[int, ...]) -> None:
        self.h_a = nn.Sequential(
            conv(latent, width, 3), nn.ReLU(), conv(width, width, 5, 2), nn.ReLU(), conv(width, width, 5, 2)
        )
        middle, side = width * 3 // 2, 2 * width
        self.h_s = nn.Sequential(
            deconv(width, width, 5, 2), nn.ReLU(), deconv(width, middle, 5, 2), nn.ReLU(), deconv(middle, side, 3)
        )
        self.channel, self.spatial, self.merge = (nn.ModuleList() for _ in range(3))
        for k, own in enumerate(groups):
            if k:
                first, second = context
                layers = [conv(sum(groups[:k]), first, 5), nn.ReLU(), conv(first, second, 5), nn.ReLU()]
                self.channel.append(nn.Sequential(*layers, conv(second, 2 * own, 5)))
            self.spatial.append(CheckerboardConv2d(own, 2 * own, 5, padding=2))
            inside = 2 * own * (2 if k else 1) + side
            widths = [inside, *(max(side, (inside * (3 - i) + 2 * own * i) // 3) for i in (1, 2)), 2 * own]
            layers = [layer for a, b in pairwise(widths) for layer in (conv(a, b, 1), nn.ReLU())]
            self.merge.append(nn.Sequential(*layers[:-1]))
        scales = scale_table()
        self.register_buffer("scales", scales.float())
        self.register_buffer("scale_counts", gaussian_counts(scales))

    @property
    def factor(self) -> int:
        """What a picture's sides have to be multiples of."""
        return 64 if self.config["hyper"] else 16

    def latent_shapes(self, n: int, height: int, width: int) -> list[tuple[int, ...]]:
        """The shapes of y, and of z if there is one, for ``n`` pictures."""
        y = (n, self.config["latent"], height // 16, width // 16)
        return [y, (n, self.config["width"], height // 64, width // 64)] if self.config["hyper"] else [y]

    # In floating point: training, and pictures that nobody sends

    def forward(
        self, x: Float[Tensor, "batch 3 height width"], noise: list[Tensor] | None = None
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch"]]:
        """The picture decoded from rounded latents (straight-through), not clipped, and the bits of each picture.

        Args:
            noise: uniform in [-1/2, 1/2], of `latent_shapes`, with which the bits are differentiable; None: the bits of
                the rounded latents.
        """
        y = self.g_a(x)
        y_hat, cost = self.rounded(y, noise)
        return self.g_s(y_hat), cost

    def rounded(
        self, y: Float[Tensor, "batch latent h w"], noise: list[Tensor] | None = None
    ) -> tuple[Float[Tensor, "batch latent h w"], Float[Tensor, "batch"]]:
        """The latents rounded around their means, and the bits of each sample; see `forward`."""
        y = wide(y)
        if not self.config["hyper"]:
            return self._around_median(y, None if noise is None else noise[0])
        z_hat, cost = self._around_median(wide(self.h_a(y)), None if noise is None else noise[1])
        parts = [cost]

        def choose(own: slice, where: Tensor, scales: Tensor, means: Tensor) -> Tensor:
            scales, means = wide(scales), wide(means)
            value = ste_round(y[:, own] - means) + means
            priced = value if noise is None else y[:, own] + noise[0][:, own]
            likelihood = gaussian_likelihood(priced, scales, means)
            parts.append(bits(torch.where(where, likelihood, 1.0)))
            return value * where

        y_hat = self.walk(z_hat, choose, lambda net, value: net(value))
        return y_hat, torch.stack(parts).sum(0)

    def _around_median(self, z: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        centre = self.prior.centre(z.ndim)
        value = ste_round(z - centre) + centre
        return value, bits(self.prior.likelihood(value if noise is None else z + noise))

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """x_mse: what comes back of a picture, clipped to [-1, 1]; from rounded latents, never from noisy ones.

        In full precision, also inside automatic mixed precision: what a decoder is trained on is what it will be given.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self.g_s(self.rounded(self.g_a(x.to(self.dtype)))[0]).clamp(-1, 1)

    def walk(
        self, z_hat: Float[Tensor, "batch width h4 w4"], choose: Choose, net: Net
    ) -> Float[Tensor, "batch latent h w"]:
        """All groups of y in their order, in two passes each.

        Args:
            z_hat: the rounded hyper-latents.
            choose: ``choose(channels, where, scales, means)``: the values at the places ``where``, and 0 elsewhere.
            net: runs a network, in floating or in fixed point.
        """
        side = net(self.h_s, z_hat)
        batch, _, height, width = side.shape
        first = checkerboard(height, width, side.device)
        done: list[Tensor] = []
        start = 0
        for k, own in enumerate(self.config["groups"]):
            channels, start = slice(start, start + own), start + own
            told = [net(self.channel[k - 1], torch.cat(done, 1)), side] if k else [side]
            seen = side.new_zeros(batch, 2 * own, height, width)
            passes = []
            for where in (first, ~first):
                scales, means = net(self.merge[k], torch.cat([seen, *told], 1)).chunk(2, 1)
                passes.append(choose(channels, where, scales, means))
                seen = net(self.spatial[k], passes[0])
            done.append(passes[0] + passes[1])
        return torch.cat(done, 1)

    # In fixed point: what is written and read

    @torch.no_grad()
    def freeze(self) -> None:
        """Write down the tables of the factorised prior, as its density now is; codes need them."""
        self.prior_counts = self.prior.counts(self._centre()).to(self.prior_counts.device)

    def _centre(self) -> Float[Tensor, "channel"]:
        return on_grid(self.prior.median, largest=LARGEST)

    @torch.no_grad()
    def coded(
        self, coder: Coder, height: int, width: int, y: Float[Tensor, "1 latent h w"] | None = None
    ) -> Float[Tensor, "1 latent h w"]:
        """The rounded latents of one picture of that size, passed through ``coder``; float64.

        Args:
            coder: writes, reads or counts.
            y: of the encoder; None to read.

        Raises:
            BadInput: the tables are not there yet; see `freeze`.
        """
        if not self.prior_counts.any():
            raise BadInput("this codec has no tables yet: train it to the end, or call freeze()")
        shapes = self.latent_shapes(1, height, width)
        if y is not None:
            y = y.double().clamp(-LARGEST, LARGEST)
        top = y if not self.config["hyper"] or y is None else self.h_a(y.to(self.dtype))
        z_hat = self._coded_around_median(coder, shapes[-1], top)
        if not self.config["hyper"]:
            return z_hat

        def choose(own: slice, where: Tensor, scales: Tensor, means: Tensor) -> Tensor:
            where = where.expand_as(means)
            given = None if y is None else (y[:, own] - means).round().long()[where]
            value = torch.zeros_like(means)
            value[where] = coder.code(given, scale_index(scales, self.scales)[where], self.scale_counts).to(means)
            return (value + means) * where

        return self.walk(z_hat, choose, exact)

    def _coded_around_median(self, coder: Coder, shape: tuple[int, ...], z: Tensor | None) -> Tensor:
        centre = self._centre().view(1, -1, 1, 1)
        rows = torch.arange(shape[1]).view(1, -1, 1, 1).expand(shape).flatten()
        given = None if z is None else (z.double() - centre).round().clamp(-LARGEST, LARGEST).long().flatten()
        return coder.code(given, rows, self.prior_counts).to(centre).view(shape) + centre
