"""LoRA factors by the names of Flux.1's original code, as kohya and ComfyUI write them, in diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

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
SWAPPED = "final_layer_adaLN_modulation_1"
"""Its original gives shift and scale, diffusers' scale and shift: the halves of its rows change places."""


def layers_of(place: str) -> tuple[str, ...]:
    """diffusers' names of what the original code calls ``place`` (dots may be underscores): one layer, or several that
    it has fused, in the order of their rows; none of any other name."""
    flat = place.replace(".", "_")
    if match := re.fullmatch(r"double_blocks_(\d+)_(\w+)", flat):
        return tuple(f"transformer_blocks.{match[1]}.{name}" for name in _DOUBLE.get(match[2], ()))
    if match := re.fullmatch(r"single_blocks_(\d+)_(\w+)", flat):
        return tuple(f"single_transformer_blocks.{match[1]}.{name}" for name in _SINGLE.get(match[2], ()))
    return (_OUTSIDE[flat],) if flat in _OUTSIDE else ()


def factors(
    path: Path, key: str, place: str, factor: str, x: Tensor, layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The factor of each of diffusers' layers that a key of the original stands for; empty where it stands for none.

    A fused layer's product is up times down, so each part of its rows is a product of that part of up with the same
    down: nothing is lost, also where a trainer had split them and wrote them back as one.

    Args:
        factor: "down", "up" or "alpha".
        layers: of the network, by name.

    Raises:
        BadInput: it has other rows than those layers have together.
    """
    names = layers_of(place)
    if not names or any(name not in layers for name in names):
        return {}
    if factor != "up":
        return dict.fromkeys(names, x)
    sizes = [len(layers[name].weight) for name in names]
    if len(x) != sum(sizes):
        raise BadInput(f"{path} does not fit: {key} has {len(x)} rows, and {' and '.join(names)} have {sum(sizes)}")
    if place.replace(".", "_") == SWAPPED:
        return {names[0]: x.roll(len(x) // 2, dims=0)}
    return dict(zip(names, x.split(sizes), strict=True))
