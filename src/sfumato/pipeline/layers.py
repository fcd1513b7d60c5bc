"""Which weights of a conditional U-Net are meant by "cross.k" or "xattn": one vocabulary for all methods."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import nn

from sfumato.errors import BadInput

KINDS = tuple(f"{where}.{what}" for where in ("cross", "self") for what in ("q", "k", "v", "out"))

# Parts that ESD-u leaves alone although they are not cross-attention (the published code excludes them by
# name); SDXL's size and pooled-text embedding is added into the time embedding and counts as a part of it.
_TIME_AND_OUTPUT = ("time_embedding.", "add_embedding.", "conv_norm_out.", "conv_out.")

_SUBSETS = {
    "full": lambda name: True,
    "xattn": lambda name: ".attn2." in name,
    "xattn-strict": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "noxattn": lambda name: ".attn2." not in name and not name.startswith(_TIME_AND_OUTPUT),
    "selfattn": lambda name: ".attn1." in name,
}
SUBSETS = tuple(_SUBSETS)


@dataclass(frozen=True)
class Projection:
    """One linear projection of an attention layer.

    Attributes:
        name: the module's name inside the network, e.g.
            ``mid_block.attentions.0.transformer_blocks.0.attn2.to_k``.
        kind: "cross.q", "cross.k", "cross.v", "cross.out", or the same with "self".
        module: the linear layer; closed-form edits write to ``module.weight`` of a copy that owns it.
        resolution: side of the latent feature map at which the layer acts, at the pipeline's default picture
            size.
    """

    name: str
    kind: str
    module: nn.Linear
    resolution: int

    @property
    def weight(self) -> Float[nn.Parameter, "out in"]:
        return self.module.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(output width, input width)."""
        return tuple(self.module.weight.shape)


def attention_layers(network: nn.Module) -> list[tuple[str, str, Attention]]:
    """Every attention layer in the transformer blocks: (name, "cross" or "self", layer), in network order."""
    where = {"attn1": "self", "attn2": "cross"}
    found = ((name, where.get(name.rsplit(".", 1)[-1]), m) for name, m in network.named_modules())
    return [(name, kind, m) for name, kind, m in found if kind and isinstance(m, Attention)]


def projections(network: nn.Module, kinds: tuple[str, ...]) -> list[Projection]:
    """The attention projections of the given kinds (all if none is given), in network order.

    Raises:
        BadInput: unknown kind.
    """
    if unknown := [k for k in kinds if k not in KINDS]:
        raise BadInput(f"unknown projection {unknown[0]!r}: choose from {', '.join(KINDS)}")
    wanted = kinds or KINDS
    sides = block_sides(network)
    found = []
    for name, where, layer in attention_layers(network):
        for what in ("q", "k", "v", "out"):
            if f"{where}.{what}" not in wanted:
                continue
            suffix, module = (
                ("to_out.0", layer.to_out[0])
                if what == "out"
                else (f"to_{what}", getattr(layer, f"to_{what}"))
            )
            found.append(Projection(f"{name}.{suffix}", f"{where}.{what}", module, side_of(name, sides)))
    return found


def parameters(network: nn.Module, subset: str) -> dict[str, nn.Parameter]:
    """The network's parameters in one of the named subsets; see `Text2Image.parameters`.

    Raises:
        BadInput: unknown subset, or one that selects nothing in this network.
    """
    if subset not in _SUBSETS:
        raise BadInput(f"unknown set of parameters {subset!r}: choose from {', '.join(SUBSETS)}")
    chosen = {name: p for name, p in network.named_parameters() if _SUBSETS[subset](name)}
    if not chosen:
        raise BadInput(f"the set of parameters {subset!r} is empty in this network: it has no such layers")
    return chosen


def block_sides(network: nn.Module) -> dict[str, int]:
    """Feature-map side inside each block ("down_blocks.0", "mid_block", ...), at the default latent size.

    Read off the structure: every stride-2 convolution with padding 1 maps a side s to ceil(s / 2), and an up
    block works at the side of the down block whose skip connections it receives.
    """
    size = network.config.sample_size
    side = size if isinstance(size, int) else size[0]
    sides = {}
    for i, block in enumerate(network.down_blocks):
        sides[f"down_blocks.{i}"] = side
        if block.downsamplers is not None:
            side = -(-side // 2)
    sides["mid_block"] = side
    last = len(network.down_blocks) - 1
    for i in range(len(network.up_blocks)):
        sides[f"up_blocks.{i}"] = sides[f"down_blocks.{last - i}"]
    return sides


def side_of(name: str, sides: dict[str, int]) -> int:
    parts = name.split(".")
    return sides["mid_block"] if parts[0] == "mid_block" else sides[".".join(parts[:2])]
