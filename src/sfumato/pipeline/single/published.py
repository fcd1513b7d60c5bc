"""SD 1.x and SDXL as they were published, without weights: shapes to reckon with where nobody has the files."""

from __future__ import annotations

from typing import Any

import torch

from ..base import Text2Image
from ..codec import overflows, widen
from ..load import wrap
from . import infer
from .names import SD1, SDXL, Layout
from .read import _assembled, _empty, read_tokenizer

_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_DDIM = {**infer._TABLE, "_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
_CLIP = infer._text(49408, 768, 3072, 12, 77, hidden_act="quick_gelu", projection_dim=768)
_OPEN_CLIP = infer._text(49408, 1280, 5120, 32, 77, hidden_act="gelu", projection_dim=1280)
_XL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SHAPES: dict[str, tuple[Layout, dict[str, dict[str, Any]]]] = {
    "sd1": (SD1, {"unet": {"sample_size": 64, "cross_attention_dim": 768}, "vae": _VAE, "text_encoder": _CLIP}),
    "sdxl": (SDXL, {"unet": _XL, "vae": _VAE, "text_encoder": _CLIP, "text_encoder_2": _OPEN_CLIP}),
}
"""Name -> (layout, configuration of each part beyond the defaults of its class)."""


def published(name: str, dtype: torch.dtype = torch.float32) -> Text2Image:
    """A pipeline of these shapes on the meta device, which can neither encode nor draw."""
    layout, configs = SHAPES[name]
    parts = {part: _empty(part, config).to("meta", dtype).eval() for part, config in configs.items()}
    if dtype == torch.float16 and overflows(parts["vae"]):
        widen(parts["vae"])
    pads = {"text_encoder": "<|endoftext|>", "text_encoder_2": "!"}
    tokenizers = {f"tokenizer{k.removeprefix('text_encoder')}": read_tokenizer(pads[k]) for k in pads if k in parts}
    return wrap(_assembled(layout, parts, tokenizers, _DDIM))
