"""Generators and discriminators of GANs by genotype, and the supernets that hold them all (arXiv:2111.15097).

A net without a genotype is a supernet: every edge has all its operations, and `forward` is told which to run. With one
it has what that genotype needs and nothing else; its weights are called as in the supernet, so that one is loaded with
the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, relu
from torch.nn.utils.parametrizations import spectral_norm

from sfumato.errors import BadInput

from .genotypes import DISCRIMINATOR, GENERATOR, Genotype

# kernel, padding, dilation by the number of a normal operation; downwards they are two numbers earlier
CONVOLUTIONS = {2: (1, 0, 1), 3: (3, 1, 1), 4: (5, 2, 1), 5: (3, 2, 2), 6: (5, 4, 2)}
RESIZED = ("nearest", "bilinear", "nearest")
"""How skips come to the size of each cell."""


class Convolution(nn.Module):
    """ReLU (unless told otherwise), then a convolution, with spectral normalisation in discriminators."""

    def __init__(self, channels: int, operation: int, stride: int = 1, normed: bool = False, activated: bool = True):
        super().__init__()
        kernel, padding, dilation = CONVOLUTIONS[operation]
        conv = nn.Conv2d(channels, channels, kernel, stride, padding, dilation)
        self.conv, self.activated = spectral_norm(conv) if normed else conv, activated

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(relu(x) if self.activated else x)


class Up(nn.Module):
    """Twice the size: interpolated, ReLU, 1x1; or ReLU, a transposed 3x3 of each channel, 1x1."""

    def __init__(self, channels: int, operation: int):
        super().__init__()
        self.operation = operation
        if operation == 2:
            self.each = nn.ConvTranspose2d(channels, channels, 3, 2, 1, 1, groups=channels, bias=False)
        self.mix = nn.Conv2d(channels, channels, 1, bias=operation != 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.operation == 2:
            return self.mix(self.each(relu(x)))
        return self.mix(relu(interpolate(x, scale_factor=2, mode=("nearest", "bilinear")[self.operation])))


def _normal(channels: int, operation: int, normed: bool, activated: bool = True) -> nn.Module:
    return nn.Identity() if operation == 1 else Convolution(channels, operation, 1, normed, activated)


def _down(channels: int, operation: int) -> nn.Module:
    if operation < 2:
        return (nn.AvgPool2d if operation == 0 else nn.MaxPool2d)(2)
    return Convolution(channels, operation + 1, 2, True)


class Edge(nn.ModuleDict):
    """The operations of one edge by their numbers."""

    def forward(self, x: Tensor, gene: int) -> Tensor:
        return self[str(gene)](x)


class GeneratorCell(nn.Module):
    """n2 = c0(n0) + c1(n1) (+ skips), n3 = c2(n0) + c3(n1) + c4(n2), of n0 and n1, two ways up.

    Args:
        genes: which operations each edge has.
        skips: earlier cells whose n2 comes in.
    """

    def __init__(self, channels: int, genes: Sequence[Sequence[int]], skips: int, mode: str):
        super().__init__()
        self.mode = mode
        self.up = nn.ModuleList([Edge({str(g): Up(channels, g) for g in genes[i]}) for i in range(2)])
        self.edges = nn.ModuleList(
            [Edge({str(g): _normal(channels, g, False) for g in genes[i + 2] if g}) for i in range(5)]
        )  # fmt: skip
        self.skips = nn.ModuleList([nn.Conv2d(channels, channels, 1) for _ in range(skips)])

    def forward(
        self, x: Float[Tensor, "n c h w"], skips: Sequence[Tensor], gene: Sequence[int], wanted: bool
    ) -> tuple[Tensor | None, Float[Tensor, "n c 2h 2w"]]:
        """n2 (None where nobody looks at it) and n3."""
        # whoever is not looked at has no weights
        ways = [up(x, g) if str(g) in up else None for up, g in zip(self.up, gene, strict=False)]
        n2 = None
        if wanted:
            n2 = _sum(edge(n, g) for edge, n, g in zip(self.edges[:2], ways, gene[2:4], strict=True) if g)
            for conv, skip in zip(self.skips, skips, strict=True):
                n2 = n2 + conv(interpolate(skip, size=n2.shape[-2:], mode=self.mode))  # never in place
        inputs = zip(self.edges[2:], (*ways, n2), gene[4:], strict=True)
        return n2, _sum(edge(n, g) for edge, n, g in inputs if g)


def _sum(terms: Any) -> Tensor:
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def looked_at(genotype: Genotype) -> tuple[bool, ...]:
    """Of which cells of a generator n2 goes anywhere: to its own n3, or as a skip to a later n2 that does."""
    found: list[bool] = []
    for cell in reversed(genotype):
        found.insert(0, cell[6] != 0 or any(found))
    return tuple(found)


def _generator_genes(genotype: Genotype | None) -> list[list[tuple[int, ...]]]:
    """The operations of every edge of every cell."""
    if genotype is None:
        return [[tuple(GENERATOR.values(g)) for g in range(7)] for _ in range(3)]
    genes: list[list[tuple[int, ...]]] = []
    for cell, wanted in zip(genotype, looked_at(genotype), strict=True):
        used = [cell[2] * wanted, cell[3] * wanted, *cell[4:]]
        ways = [bool(used[i] or used[i + 2]) for i in range(2)]
        edges: list[tuple[int, ...]] = [(cell[i],) if ways[i] else () for i in range(2)]
        genes.append(edges + [(g,) if g else () for g in used])
    return genes


class GenotypeGenerator(ModelMixin, ConfigMixin):
    """Noise to pictures in [-1, 1]: three cells, each of which is also told a third of the noise.

    In the signature of `sfumato.nets` it is a model that draws in one step: of noise shaped like pictures it takes the
    first ``latent`` numbers.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, size: int = 32, channels: int = 256, latent: int = 120, genotype: Sequence[Sequence[int]] | None = None
    ):
        super().__init__()
        if size < 8 or size % 8:
            raise BadInput(f"size must be a multiple of 8, got {size}: the generator doubles its side three times")
        if latent < 3 or latent % 3:
            raise BadInput(f"latent must be a multiple of 3, got {latent}: each cell has a third of it")
        self.genotype = None if genotype is None else GENERATOR.check(genotype)
        self.channels, self.width, self.latent = channels, size // 8, latent
        genes = _generator_genes(self.genotype)
        wanted = looked_at(self.genotype) if self.genotype else (True,) * 3
        self.linear = nn.ModuleList(
            [nn.Linear(latent // 3, channels * (self.width * 2**i) ** 2) for i in range(3)]
        )  # fmt: skip
        self.cells = nn.ModuleList(
            [GeneratorCell(channels, genes[i], i if wanted[i] else 0, RESIZED[i]) for i in range(3)]
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(channels)
        self.rgb = nn.Conv2d(channels, 3, 3, 1, 1)

    def forward(
        self, z: Float[Tensor, "n *latent"], logsnr: Any = None, labels: Any = None, genotype: Genotype | None = None
    ) -> Float[Tensor, "n 3 size size"]:
        gene = genotype or self.genotype
        if gene is None:
            raise ValueError("a supernet is told a genotype")
        z = z.flatten(1)[:, : self.latent].chunk(3, dim=1)
        wanted, h = looked_at(gene), None
        skips: list[Tensor | None] = []
        for i, (linear, cell) in enumerate(zip(self.linear, self.cells, strict=True)):
            side = self.width * 2**i
            base = linear(z[i]).view(-1, self.channels, side, side)
            n2, h = cell(base if h is None else h + base, skips if wanted[i] else (), gene[i], wanted[i])
            skips = [*skips, n2]
        return self.rgb(relu(self.norm(h))).tanh()


class DiscriminatorCell(nn.Module):
    """n1 = c0(x), n2 = c1(x) + c2(n1), n3 = c3(n1) + c4(x), and n2 + n3, both made smaller or neither."""

    def __init__(self, channels: int, genes: Sequence[Sequence[int]]):
        super().__init__()
        # c4 has no ReLU in front
        self.edges = nn.ModuleList(
            [Edge({str(g): _normal(channels, g, True, i != 4) for g in genes[i] if g}) for i in range(5)]
        )  # fmt: skip
        self.down = nn.ModuleList([Edge({str(g): _down(channels, g) for g in genes[i] if g >= 0}) for i in (5, 6)])

    def forward(self, x: Float[Tensor, "n c h w"], gene: Sequence[int]) -> Tensor:
        c0, c1, c2, c3, c4 = self.edges
        n1 = c0(x, gene[0]) if gene[2] or gene[3] else None
        n2 = _sum(edge(n, g) for edge, n, g in ((c1, x, gene[1]), (c2, n1, gene[2])) if g)
        n3 = _sum(edge(n, g) for edge, n, g in ((c3, n1, gene[3]), (c4, x, gene[4])) if g)
        if gene[5] < 0:
            return n2 + n3
        return self.down[0](n2, gene[5]) + self.down[1](n3, gene[6])


class Stem(nn.Module):
    """Colours to channels at half the size, by a residual block."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (spectral_norm(nn.Conv2d(c, channels, 3, padding=1)) for c in (3, channels))
        self.short = spectral_norm(nn.Conv2d(3, channels, 1))

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h2 w2"]:
        return avg_pool2d(self.second(relu(self.first(x))), 2) + self.short(avg_pool2d(x, 2))


def _discriminator_genes(genotype: Genotype | None, cell: int) -> list[Sequence[int]]:
    """The operations of every edge of a cell; n1 may go nowhere."""
    if genotype is None:
        return [tuple(DISCRIMINATOR.values(g)) for g in range(7)]
    gene = genotype[cell]
    return [(gene[0],) if gene[2] or gene[3] else (), *((g,) for g in gene[1:])]


class GenotypeDiscriminator(nn.Module):
    """Pictures in [-1, 1] to one number each, all layers with spectral normalisation."""

    def __init__(self, channels: int = 128, genotype: Sequence[Sequence[int]] | None = None):
        super().__init__()
        self.genotype = None if genotype is None else DISCRIMINATOR.check(genotype)
        self.stem = Stem(channels)
        self.cells = nn.ModuleList(
            [DiscriminatorCell(channels, _discriminator_genes(self.genotype, i)) for i in range(3)]
        )  # fmt: skip
        self.last = spectral_norm(nn.Linear(channels, 1, bias=False))

    def forward(self, x: Float[Tensor, "n 3 h w"], genotype: Genotype | None = None) -> Float[Tensor, "n 1"]:
        gene = genotype or self.genotype
        if gene is None:
            raise ValueError("a supernet is told a genotype")
        h = self.stem(x)
        for cell, genes in zip(self.cells, gene, strict=True):
            h = cell(h, genes)
        return self.last(relu(h).sum((2, 3)))


class SimpleDiscriminator(nn.Module):
    """Five 4x4 convolutions of stride 2, every second one without normalisation behind it: the paper's variant GD2."""

    def __init__(self, channels: int = 128):
        super().__init__()
        widths = (3, channels // 2, *[channels] * 4)
        layers: list[nn.Module] = []
        for i in range(5):
            layers.append(nn.Conv2d(widths[i], widths[i + 1], 4, 2, 1))
            layers += [nn.BatchNorm2d(widths[i + 1]), nn.LeakyReLU(0.2)] if i % 2 == 0 else []
        self.layers = nn.Sequential(*layers)
        self.last = spectral_norm(nn.Linear(channels, 1, bias=False))

    def forward(self, x: Float[Tensor, "n 3 h w"], genotype: Genotype | None = None) -> Float[Tensor, "n 1"]:
        return self.last(self.layers(x).sum((2, 3)))


def part_of(net: nn.Module, supernet: nn.Module) -> None:
    """Load into ``net``, which has a genotype, copies of the weights that the supernet (or its equal) has for it."""
    state = supernet.state_dict()
    net.load_state_dict({name: state[name].detach().clone() for name in net.state_dict()})


def count_generator(size: int, channels: int, latent: int, genotype: Genotype | None = None) -> int:
    """The parameters of a generator of these settings, or of the supernet."""
    wanted = looked_at(genotype) if genotype else (True,) * 3
    count = sum((latent // 3 + 1) * channels * (size // 8 * 2**i) ** 2 for i in range(3)) + 2 * channels
    count += 27 * channels + 3
    for i, genes in enumerate(_generator_genes(genotype)):
        count += i * wanted[i] * _weights(channels, 2)
        count += sum(channels**2 + (9 * channels if g == 2 else channels) for way in genes[:2] for g in way)
        count += sum(_weights(channels, g) for edge in genes[2:] for g in edge)
    return count


def count_discriminator(channels: int, genotype: Genotype | None = None) -> int:
    """The parameters of a discriminator by genotype, or of the supernet."""
    count = 27 * channels + channels + _weights(channels, 3) + 4 * channels + channels
    for i in range(3):
        genes = _discriminator_genes(genotype, i)
        count += sum(_weights(channels, g) for edge in genes[:5] for g in edge)
        count += sum(_weights(channels, g + 1) for edge in genes[5:] for g in edge if g > 1)
    return count


def _weights(channels: int, operation: int) -> int:
    """The parameters of a normal operation."""
    return channels * (channels * CONVOLUTIONS[operation][0] ** 2 + 1) if operation > 1 else 0
