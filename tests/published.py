"""The published configurations of denoising networks, as data: what the defaults of diffusers' classes are not.

Read off diffusers' own conversion scripts (SD3.5's number of blocks, heads and positions, Sana 1.6B, Flux.2 dev and
Klein), its documentation and its classes' defaults (SD 1.x, PixArt-Sigma, SD3 medium, Flux.1, Qwen-Image, Z-Image). The
counts of parameters are what these configurations give here; those of the models' cards are rounded, and agree to 3 per
cent (with the table of positions, which SD3's files hold). Where text enters and what attention is called is tested
too. None of them was checked against the ``config.json`` beside the model's own weights: what a model changed there
would not be noticed.
"""

from __future__ import annotations

from typing import Any

NETWORKS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "sd1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768, "sample_size": 64}, "UNetAnatomy", 859_520_964),
    "sd2.1": (
        "UNet2DConditionModel",
        {
            "cross_attention_dim": 1024, "sample_size": 96, "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "UNetAnatomy", 865_910_724,
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "UNetAnatomy", 2_567_463_684,
    ),
    "pixart-sigma": (
        "PixArtTransformer2DModel", {"caption_channels": 4096, "use_additional_conditions": False},
        "PixArtAnatomy", 610_856_096,
    ),
    "sana-1.6b": ("SanaTransformer2DModel", {}, "SanaAnatomy", 1_604_462_752),
    "sd3-medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        "SD3Anatomy", 2_028_328_000,
    ),
    "sd3.5-medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        "SD3Anatomy", 2_243_171_520,
    ),
    "sd3.5-large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        "SD3Anatomy", 8_056_627_520,
    ),
    "flux.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, "FluxAnatomy", 11_901_408_320),
    "flux.1-schnell": ("FluxTransformer2DModel", {}, "FluxAnatomy", 11_891_178_560),
    "qwen-image": ("QwenImageTransformer2DModel", {}, "QwenAnatomy", 20_430_401_088),
    "z-image": ("ZImageTransformer2DModel", {}, "ZImageAnatomy", 6_154_908_736),
    "flux.2-dev": ("Flux2Transformer2DModel", {}, "Flux2Anatomy", 32_223_281_152),
    "flux.2-klein-4b": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "Flux2Anatomy", 3_875_544_576,
    ),
    "flux.2-klein-9b": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
        "Flux2Anatomy", 9_078_581_248,
    ),
}  # fmt: skip
"""Name -> (class of diffusers, its configuration beyond the defaults, our anatomy, parameters)."""
