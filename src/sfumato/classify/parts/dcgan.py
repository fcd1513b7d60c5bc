"""The encoder and decoder of probabilistic prototypes: four convolutions each, down to one place and back."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def _after(channels: int) -> list[nn.Module]:
    """As Keras has it: its constant, and statistics that change by a hundredth a batch."""
    return [nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01), nn.LeakyReLU(0.2)]


def _started(net: nn.Sequential) -> nn.Sequential:
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return net


def encoder(channels: int, widths: tuple[int, ...], size: int, outputs: int) -> nn.Sequential:
    """Pictures to ``outputs`` numbers each; the last of ``widths`` is of the layer that takes in what is left."""
    layers: list[nn.Module] = []
    for inputs, width in pairwise((channels, *widths[:-1])):
        layers += [nn.Conv2d(inputs, width, 4, stride=2, padding=1), *_after(width)]
    left = size // 2 ** (len(widths) - 1)
    layers += [nn.Conv2d(widths[-2], widths[-1], left), *_after(widths[-1])]
    return _started(nn.Sequential(*layers, nn.Conv2d(widths[-1], outputs, 1), nn.Flatten()))


def decoder(inputs: int, widths: tuple[int, ...], size: int, channels: int) -> nn.Sequential:
    """The way back, to pictures in [-1, 1]."""
    left = size // 2 ** (len(widths) - 1)
    layers: list[nn.Module] = [nn.Unflatten(1, (inputs, 1, 1)), nn.Conv2d(inputs, widths[-1], 1), *_after(widths[-1])]
    layers += [nn.ConvTranspose2d(widths[-1], widths[-2], left), *_after(widths[-2])]
    for wide, width in pairwise(widths[-2::-1]):
        layers += [nn.ConvTranspose2d(wide, width, 4, stride=2, padding=1), *_after(width)]
    return _started(nn.Sequential(*layers, nn.ConvTranspose2d(widths[0], channels, 4, stride=2, padding=1), nn.Tanh()))
