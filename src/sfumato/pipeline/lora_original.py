"""LoRA factors by the names of networks' original code, as kohya and ComfyUI write them, in diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from sfumato.errors import BadInput

Layers = Mapping[str, tuple[str, ...]]
"""The original's name, with underscores in the place of dots -> diffusers' names: several where it has fused them."""
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


@dataclass(frozen=True)
class Original:
    """The names of a network's layers in its original code.

    Attributes:
        blocks: what it calls a list of blocks -> what diffusers calls it, and the layers of each block.
        outside: the layers outside of blocks.
    """

    blocks: Mapping[str, tuple[str, Layers]]
    outside: Layers

    def layers(self, flat: str) -> tuple[str, ...]:
        """diffusers' names of what the original calls ``flat``; none where it calls nothing so."""
        match = re.fullmatch(r"(\w+?)_(\d+)_(\w+)", flat)
        if match and match[1] in self.blocks:
            blocks, inside = self.blocks[match[1]]
            return tuple(f"{blocks}.{match[2]}.{name}" for name in inside.get(match[3], ()))
        return self.outside.get(flat, ())


def _one(names: Mapping[str, str]) -> Layers:
    return {original: (name,) for original, name in names.items()}


def _embedders(embed: str) -> Layers:
    """What Flux.1 and Flux.2 have outside of their blocks; ``embed`` is diffusers' name of what embeds time."""
    return _one({
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in_in_layer": f"{embed}.timestep_embedder.linear_1",
        "time_in_out_layer": f"{embed}.timestep_embedder.linear_2",
        "guidance_in_in_layer": f"{embed}.guidance_embedder.linear_1",
        "guidance_in_out_layer": f"{embed}.guidance_embedder.linear_2",
        "final_layer_linear": "proj_out",
        "final_layer_adaLN_modulation_1": "norm_out.linear",
    })  # fmt: skip


_ATTENTION = {
    "img_attn_qkv": _QKV,
    "txt_attn_qkv": _ADDED_QKV,
    **_one({"img_attn_proj": "attn.to_out.0", "txt_attn_proj": "attn.to_add_out"}),
}
FLUX = Original(
    {
        "double_blocks": ("transformer_blocks", {**_ATTENTION, **_one({
            "img_mlp_0": "ff.net.0.proj",
            "img_mlp_2": "ff.net.2",
            "txt_mlp_0": "ff_context.net.0.proj",
            "txt_mlp_2": "ff_context.net.2",
            "img_mod_lin": "norm1.linear",
            "txt_mod_lin": "norm1_context.linear",
        })}),
        "single_blocks": ("single_transformer_blocks", {
            "linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",),
        }),
    },
    {**_embedders("time_text_embed"), **_one({
        "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    })},
)  # fmt: skip
FLUX2 = Original(
    {
        "double_blocks": ("transformer_blocks", {**_ATTENTION, **_one({
            "img_mlp_0": "ff.linear_in",
            "img_mlp_2": "ff.linear_out",
            "txt_mlp_0": "ff_context.linear_in",
            "txt_mlp_2": "ff_context.linear_out",
        })}),
        "single_blocks": ("single_transformer_blocks", _one({
            "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out",
        })),
    },
    {**_embedders("time_guidance_embed"), **_one({
        "double_stream_modulation_img_lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt_lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation_lin": "single_stream_modulation.linear",
    })},
)  # fmt: skip
SD3 = Original(
    {"joint_blocks": ("transformer_blocks", {
        "x_block_attn_qkv": _QKV,
        "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "context_block_attn_qkv": _ADDED_QKV,
        **_one({
            "x_block_attn_proj": "attn.to_out.0",
            "x_block_attn2_proj": "attn2.to_out.0",
            "x_block_mlp_fc1": "ff.net.0.proj",
            "x_block_mlp_fc2": "ff.net.2",
            "x_block_adaLN_modulation_1": "norm1.linear",
            "context_block_attn_proj": "attn.to_add_out",
            "context_block_mlp_fc1": "ff_context.net.0.proj",
            "context_block_mlp_fc2": "ff_context.net.2",
            "context_block_adaLN_modulation_1": "norm1_context.linear",
        }),
    })},
    _one({
        "x_embedder_proj": "pos_embed.proj",
        "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
        "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
        "final_layer_linear": "proj_out",
        "final_layer_adaLN_modulation_1": "norm_out.linear",
    }),
)  # fmt: skip
_ZIMAGE: Layers = {
    "attention_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"), "attention_out": ("attention.to_out.0",),
}  # fmt: skip
ZIMAGE = Original(
    {blocks: (blocks, _ZIMAGE) for blocks in ("layers", "noise_refiner", "context_refiner")},
    _one({
        "x_embedder": "all_x_embedder.2-1",
        "final_layer_linear": "all_final_layer.2-1.linear",
        "final_layer_adaLN_modulation_1": "all_final_layer.2-1.adaLN_modulation.1",
    }),
)  # fmt: skip
_NETWORKS = {
    "FluxTransformer2DModel": FLUX, "Flux2Transformer2DModel": FLUX2, "SD3Transformer2DModel": SD3,
    "ZImageTransformer2DModel": ZIMAGE,
}  # fmt: skip


def layers_of(place: str, network: nn.Module) -> tuple[str, ...]:
    """diffusers' names of what the original code of a network calls ``place`` (dots may be underscores): one layer, or
    several that it has fused, in the order of their rows; none where it differs in nothing, or is not known."""
    known = _NETWORKS.get(type(network).__name__)
    return known.layers(place.replace(".", "_")) if known else ()


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
