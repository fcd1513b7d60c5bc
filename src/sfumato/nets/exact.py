"""Networks in fixed point: the same answer to the last bit on every machine, however its sums are ordered.

A decoder has to find the very numbers that the encoder had, or it reads nothing but noise from there on; in floating
point another library, processor or number of threads rounds otherwise (Ballé, Johnston and Minnen, "Integer Networks
for Data Compression with Latent-Variable Models", ICLR 2019). Here weights and activations are whole multiples of
powers of two, so small that float64 holds every partial sum exactly: the order of summation does not matter, and the
only roundings are those that are written down. That paper trains with the rounding; here a trained network is rounded.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .entropy import CheckerboardConv2d

WEIGHT, VALUE = 2.0**12, 2.0**10
"""Weights are multiples of 1 / WEIGHT, activations of 1 / VALUE."""
LARGEST_WEIGHT, LARGEST_VALUE = 2.0**4, 2.0**11
"""Beyond these they are clipped."""
TERMS = 2**15
"""Products in a sum at the most: 2^(4 + 12) 2^(11 + 10) 2^15 = 2^52, and float64 counts to 2^53."""


def on_grid(x: Float[Tensor, "*dims"], step: float = VALUE, largest: float = LARGEST_VALUE) -> Float[Tensor, "*dims"]:
    """The nearest multiple of 1 / ``step`` (of two, the even one), clipped to ``largest``; float64."""
    return (x.double() * step).round().div(step).clamp(-largest, largest)


@torch.no_grad()
def exact(layers: nn.Module, x: Float[Tensor, "batch inside height width"]) -> Float[Tensor, "batch out h w"]:
    """``layers`` (convolutions, transposed or not, and ReLU, one or a sequence) applied to ``x`` in fixed point.

    Args:
        x: what is no multiple of 1 / VALUE is rounded first.

    Raises:
        ValueError: another kind of layer, or one with more than `TERMS` terms in a sum.
    """
    x = on_grid(x)
    for layer in layers if isinstance(layers, nn.Sequential) else [layers]:
        if isinstance(layer, nn.ReLU):
            x = x.relu()
            continue
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            raise ValueError(f"{type(layer).__name__} cannot be computed in fixed point")
        if math.prod(layer.kernel_size) * layer.in_channels > TERMS:
            raise ValueError(f"a sum of more than {TERMS} terms is not exact: fewer channels")
        weight = layer.masked if isinstance(layer, CheckerboardConv2d) else layer.weight
        weight = on_grid(weight, WEIGHT, LARGEST_WEIGHT)
        bias = on_grid(layer.bias, WEIGHT * VALUE)
        if isinstance(layer, nn.ConvTranspose2d):
            x = F.conv_transpose2d(x, weight, bias, layer.stride, layer.padding, layer.output_padding)
        else:
            x = F.conv2d(x, weight, bias, layer.stride, layer.padding)
        x = on_grid(x)
    return x
