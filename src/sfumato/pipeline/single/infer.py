"""The configurations of a single file's networks, read off the shapes of its weights.

What shapes do not say is as published: the number of attention heads (8 in 1.x; a head to 64 channels in 2.x and XL),
32 groups in every normalisation, the picture size, the autoencoder's scale, the scheduler and the tokenizer.
"""

from __future__ import annotations

from typing import Any

from sfumato.errors import BadInput

from .facts import FOLDER, KNOWN, Facts
from .names import SD1, SD2, SDXL, Layout

Config = dict[str, Any]
SIDES = {SD1.title: 64, SD2.title: 96, SDXL.title: 128}
SCALES = {SD1.title: 0.18215, SD2.title: 0.18215, SDXL.title: 0.13025}


def configs(facts: Facts, layout: Layout, prediction: str) -> dict[str, Config]:
    """diffusers' and transformers' configurations by part, those of scheduler and tokenizers too.

    Args:
        prediction: "epsilon" or "v_prediction".

    Raises:
        BadInput: shapes that no such network has.
    """
    side = 64 if layout is SD2 and prediction == "epsilon" else SIDES[layout.title]
    parts = {part: facts.under(prefix) for part, prefix in layout.prefixes.items()}
    vae = _vae(parts["vae"], SCALES[layout.title])
    vae["sample_size"] = side * 2 ** (len(vae["block_out_channels"]) - 1)
    made = {"unet": {**_unet(parts["unet"], layout), "sample_size": side}, "vae": vae}
    if layout is SDXL:
        read, pooled = (
            parts["unet"].shape("label_emb.0.0.weight")[1],
            parts["text_encoder_2"].shape("text_projection")[1],
        )
        # beside the pooled text, six numbers about the picture's size
        made["unet"] |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (read - pooled) // 6,
            "projection_class_embeddings_input_dim": read,
        }
    for part in layout.prefixes:
        if part.startswith("text_encoder"):
            own = part in layout.open_clip
            made[part] = (_open_clip if own else _clip)(parts[part])
            made[part.replace("text_encoder", "tokenizer")] = {"pad_token": "!" if own else "<|endoftext|>"}
    return {**made, "scheduler": _scheduler(facts, layout, prediction)}


def _unet(facts: Facts, layout: Layout) -> Config:
    levels = 1 + sum(key.endswith(".0.op.weight") for key in facts.shapes)
    blocks = facts.count(r"input_blocks\.(\d+)\.")
    row = blocks // levels
    if row < 2 or blocks != levels * row:
        raise BadInput(
            f"{facts.path} is of no layout that is read ({KNOWN}): {blocks} blocks on {levels} levels; {FOLDER}"
        )
    firsts = [1 + level * row for level in range(levels)]
    widths = [facts.shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in firsts]
    depths = [facts.count(rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in firsts]
    middle = facts.count(r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    proj = facts.shape("middle_block.1.proj_in.weight")
    heads = [8] * levels if layout is SD1 else [max(1, width // 64) for width in widths]
    config: Config = {
        "in_channels": facts.shape("input_blocks.0.0.weight")[1],
        "out_channels": facts.shape("out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": row - 1,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in depths[::-1]],
        # the middle has as many as the last level, or that none and this what the middle has
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [middle],
        "cross_attention_dim": facts.shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        "use_linear_projection": len(proj) == 2,
        "attention_head_dim": heads,
    }
    if layout is SD2:
        config["upcast_attention"] = True  # published so, for float16
    return config


def _vae(facts: Facts, scale: float) -> Config:
    levels = facts.count(r"encoder\.down\.(\d+)\.")
    widths = [facts.shape(f"encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels)]
    return {
        "in_channels": facts.shape("encoder.conv_in.weight")[1],
        "out_channels": facts.shape("decoder.conv_out.weight")[0],
        "latent_channels": facts.shape("decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": facts.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "scaling_factor": scale,
    }


def _text(words: int, width: int, hidden: int, layers: int, positions: int, **others: Any) -> Config:
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **others,
    }


def _clip(facts: Facts) -> Config:
    inner = facts.under("text_model.")
    inner = inner if inner.shapes else facts  # see `read._bare`
    words, width = inner.shape("embeddings.token_embedding.weight")
    hidden = inner.shape("encoder.layers.0.mlp.fc1.weight")[0]
    positions = inner.shape("embeddings.position_embedding.weight")[0]
    layers = inner.count(r"encoder\.layers\.(\d+)\.")
    return _text(words, width, hidden, layers, positions, hidden_act="quick_gelu", projection_dim=width)


def _open_clip(facts: Facts) -> Config:
    words, width = facts.shape("token_embedding.weight")
    hidden = facts.shape("transformer.resblocks.0.mlp.c_fc.weight")[0]
    layers = facts.count(r"transformer\.resblocks\.(\d+)\.")
    if layers == 24:  # of 2.x, whose pipeline reads the last but one layer
        layers = 23
    out = facts.shapes.get("text_projection", (width, width))[1]
    positions = facts.shape("positional_embedding")[0]
    return _text(words, width, hidden, layers, positions, hidden_act="gelu", projection_dim=out)


_TABLE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}


def _scheduler(facts: Facts, layout: Layout, prediction: str) -> Config:
    config = {**_TABLE, "prediction_type": prediction}
    if "ztsnr" in facts:
        return {
            **config,
            "_class_name": "DDIMScheduler",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    if layout is SDXL:
        return {**config, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    named = "DDIMScheduler" if layout is SD2 else "PNDMScheduler"
    last = {"clip_sample": False} if layout is SD2 else {"skip_prk_steps": True}
    return {**config, "_class_name": named, "set_alpha_to_one": False, **last}
