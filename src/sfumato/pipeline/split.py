"""A UNet in two halves: its encoder (everything up to the bottleneck) and its decoder, each run on its own.

Both halves are the network's own ``forward``, entered again with the parts that are not wanted replaced, on a shell
that shares everything else with the network. So time embedding, added conditions (SDXL), ControlNet's residuals, odd
picture sizes, LoRA layers and hooks on blocks act as ever, and the network itself is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ENCODER_ONLY = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
"""Inputs of the network that act on its encoder only."""


@dataclass(frozen=True, eq=False)
class Features:
    """What the decoder takes from the encoder, with ControlNet's residuals added in.

    Attributes:
        skips: the skip connections, from the finest on.
        bottleneck: the output of the middle block.
        latent: (channels, height, width) of the network's input.
    """

    skips: tuple[Float[Tensor, "batch ..."], ...]
    bottleneck: Float[Tensor, "batch channel h w"]
    latent: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.bottleneck)

    def map(self, function: Callable[[Tensor], Tensor]) -> Features:
        """The same features with ``function`` applied to every tensor."""
        return Features(tuple(map(function, self.skips)), function(self.bottleneck), self.latent)


def has_halves(network: nn.Module | None) -> bool:
    """Whether a network is of the kind that `encode` and `decode` can run."""
    return isinstance(network, UNet2DConditionModel)


def encode(
    network: UNet2DConditionModel,
    z: Float[Tensor, "batch channel height width"],
    timestep: Tensor | float,
    **inputs: Any,
) -> Features:
    """Run the encoder and the middle block; ``inputs`` are what the network takes besides, by name."""
    up = _LastBlock()
    shell = _shell(network, up_blocks=[up], conv_norm_out=None, conv_out=lambda x: x)
    bottleneck = type(network).forward(shell, z, timestep, **inputs, return_dict=False)[0]
    return Features(up.skips, bottleneck, tuple(z.shape[1:]))


class _LastBlock:
    """In the place of the up blocks: keeps the skip connections, and lets the bottleneck pass."""

    resnets = range(1 << 30)
    """An up block is given as many skip connections as it has resnets: this one all that there are."""
    skips: tuple[Tensor, ...] = ()

    def __call__(self, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], **rest: Any) -> Tensor:
        self.skips = res_hidden_states_tuple
        return hidden_states


def decode(
    network: UNet2DConditionModel,
    features: Features,
    timestep: Tensor | float,
    **inputs: Any,
) -> Float[Tensor, "batch channel height width"]:
    """Run the decoder on the features of an `encode`, at a timestep (one for all, or one a row) of its own.

    With the timestep and inputs of that `encode` this is the network's own output, bit for bit.
    """
    first, *rest = features.skips
    # The bottleneck is handed over as a copy: some blocks (FreeU) scale it in place.
    shell = _shell(
        network,
        conv_in=lambda sample: first,
        down_blocks=[lambda hidden_states, temb: (hidden_states, tuple(rest))],
        mid_block=lambda sample, emb: features.bottleneck.clone(),
    )
    z = features.bottleneck.new_zeros(()).expand(len(features), *features.latent)  # only its shape is looked at
    inputs = {k: v for k, v in inputs.items() if k not in ENCODER_ONLY}
    return type(network).forward(shell, z, timestep, **inputs, return_dict=False)[0]


@torch.no_grad()
def operations(
    network: UNet2DConditionModel, z: Float[Tensor, "batch channel height width"], **inputs: Any
) -> tuple[int, int]:
    """Floating-point operations (of matrix products and convolutions) of the encoder and of the decoder."""
    with FlopCounterMode(display=False) as encoder:
        features = encode(network, z, 0, **inputs)
    with FlopCounterMode(display=False) as decoder:
        decode(network, features, 0, **inputs)
    return encoder.get_total_flops(), decoder.get_total_flops()


def _shell(network: nn.Module, **parts: Any) -> nn.Module:
    """An object that looks like the network, with some parts replaced; instance attributes hide its modules."""
    shell = object.__new__(type(network))
    vars(shell).update({**vars(network), **parts})
    return shell
