"""Convolutions of stride 2 that are padded as TensorFlow's "same", and their transposes."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad


def halved(side: int) -> int:
    """The side after a stride of 2: half of it, rounded up."""
    return -(-side // 2)


class Halving(nn.Conv2d):
    """3x3, stride 2. An even side is padded at its end only, an odd one at both."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, stride=2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        (top, left), (bottom, right) = [side % 2 for side in x.shape[-2:]], (1, 1)
        return conv2d(pad(x, (left, right, top, bottom)), self.weight, self.bias, stride=2)


class Doubling(nn.ConvTranspose2d):
    """The transpose of `Halving`, to a given side."""

    def __init__(self, inputs: int, outputs: int, side: int):
        super().__init__(inputs, outputs, 3, stride=2)
        self.side = side

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        first = self.side % 2
        y = conv_transpose2d(x, self.weight, self.bias, stride=2)
        return y[..., first : first + self.side, first : first + self.side]


def encoder(size: int, widths: tuple[int, ...]) -> tuple[nn.Sequential, list[int]]:
    """Halvings from ``widths[0]`` channels on, each with a ReLU; and the sides, the picture's first."""
    sides, layers = [size], []
    for inputs, outputs in pairwise(widths):
        layers += [Halving(inputs, outputs), nn.ReLU()]
        sides.append(halved(sides[-1]))
    return nn.Sequential(*layers), sides


def decoder(sides: list[int], widths: tuple[int, ...]) -> nn.Sequential:
    """The way back: ReLUs between, a sigmoid at the end."""
    layers: list[nn.Module] = []
    for (inputs, outputs), side in zip(pairwise(widths[::-1]), sides[-2::-1], strict=True):
        layers += [Doubling(inputs, outputs, side), nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())
