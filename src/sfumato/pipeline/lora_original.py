"""LoRA factors by the names of Flux.1's and SD3's original code, as kohya and ComfyUI write them, in diffusers'."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from sfumato.errors import BadInput

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_SD3_BLOCK = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
_SD3_OUTSIDE = {
    "x_embedder_proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}


def of_flux(flat: str) -> tuple[str, ...]:
    """`layers_of` in Flux.1."""
    if match := re.fullmatch(r"double_blocks_(\d+)_(\w+)", flat):
        return tuple(f"transformer_blocks.{match[1]}.{name}" for name in _DOUBLE.get(match[2], ()))
    if match := re.fullmatch(r"single_blocks_(\d+)_(\w+)", flat):
        return tuple(f"single_transformer_blocks.{match[1]}.{name}" for name in _SINGLE.get(match[2], ()))
    return (_OUTSIDE[flat],) if flat in _OUTSIDE else ()


def of_sd3(flat: str) -> tuple[str, ...]:
    """`layers_of` in SD3 and SD3.5."""
    if match := re.fullmatch(r"joint_blocks_(\d+)_(\w+)", flat):
        return tuple(f"transformer_blocks.{match[1]}.{name}" for name in _SD3_BLOCK.get(match[2], ()))
    return (_SD3_OUTSIDE[flat],) if flat in _SD3_OUTSIDE else ()


_NETWORKS: Mapping[str, Callable[[str], tuple[str, ...]]] = {
    "FluxTransformer2DModel": of_flux, "SD3Transformer2DModel": of_sd3,
}  # fmt: skip


def layers_of(place: str, network: nn.Module) -> tuple[str, ...]:
    """diffusers' names of what the original code calls ``place`` (dots may be underscores): one layer, or several that
    it has fused, in the order of their rows; none of any other name, and for other networks."""
    known = _NETWORKS.get(type(network).__name__)
    return known(place.replace(".", "_")) if known else ()


def factors(
    path: Path, key: str, place: str, factor: str, x: Tensor, layers: Mapping[str, nn.Module], network: nn.Module
) -> dict[str, Tensor]:
    """The factor of each of diffusers' layers that a key of the original stands for; empty where it stands for none.

    A fused layer's product is up times down, so each part of its rows is a product of that part of up with the same
    down: nothing is lost, also where a trainer had split them and wrote them back as one. A normalisation that is only
    scaled and shifted has its shift first in the original, and its scale in diffusers: the halves of its rows change
    places.

    Args:
        factor: "down", "up" or "alpha".
        layers: those of the network that take a product, by name.

    Raises:
        BadInput: it has other rows than those layers have together.
    """
    names = layers_of(place, network)
    if not names or any(name not in layers for name in names):
        return {}
    if factor != "up":
        return dict.fromkeys(names, x)
    sizes = [len(layers[name].weight) for name in names]
    if len(x) != sum(sizes):
        raise BadInput(f"{path} does not fit: {key} has {len(x)} rows, and {' and '.join(names)} have {sum(sizes)}")
    if isinstance(network.get_submodule(names[0].rpartition(".")[0]), AdaLayerNormContinuous):
        return {names[0]: x.roll(len(x) // 2, dims=0)}
    return dict(zip(names, x.split(sizes), strict=True))
