"""Tiny models of the three original layouts, and a converter that walks through the networks and counts as it goes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WIDTHS = (32, 64)
ALPHAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).pow(2).mul(-1).add(1).cumprod(0)


def clip(width, projection=False, act="quick_gelu", layers=2):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        initializer_factor=5.0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def unet(heads, context, **config):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        cross_attention_dim=context,
        attention_head_dim=heads,
        **config,
    ).eval()


def vae(scale):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        sample_size=128,
        scaling_factor=scale,
    ).eval()


def make(kind: str, prediction: str = "epsilon"):
    """A pipeline of the kind "sd1", "sd2" or "sdxl", with CLIP's own tokenizer."""
    from diffusers import (
        DDIMScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    from sfumato.pipeline.single.read import read_tokenizer

    table = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "prediction_type": prediction,
    }
    cross = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if kind == "sdxl":
            plain = {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            }
            net = unet(
                (1, 1),
                96,
                **plain,
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64 + 48,
            )
            pipe = StableDiffusionXLPipeline(
                vae(0.13025),
                clip(32),
                clip(64, True, "gelu", 3),
                read_tokenizer("<|endoftext|>"),
                read_tokenizer("!"),
                net,
                EulerDiscreteScheduler(**table, timestep_spacing="leading"),
                add_watermarker=False,
            )
        else:
            two = kind == "sd2"
            net = unet(1 if two else 8, 64, **cross, use_linear_projection=two)
            solver = (
                DDIMScheduler(**table, clip_sample=False, set_alpha_to_one=False)
                if two
                else PNDMScheduler(**table, skip_prk_steps=True, set_alpha_to_one=False)
            )
            pipe = StableDiffusionPipeline(
                vae(0.18215),
                clip(64, act="gelu" if two else "quick_gelu"),
                read_tokenizer("!" if two else "<|endoftext|>"),
                net,
                solver,
                None,
                None,
                requires_safety_checker=False,
            )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def original(pipe, kind: str) -> dict[str, torch.Tensor]:
    """All weights under the names of the original code, made by walking through the modules."""
    out: dict[str, torch.Tensor] = {}

    def put(module, key, **renamed):
        for name, x in module.state_dict().items():
            first, _, rest = name.partition(".")
            out[f"{key}.{renamed.get(first, first)}{'.' + rest if rest else ''}"] = x

    def resnet(module, key):
        put(
            module,
            key,
            norm1="in_layers.0",
            conv1="in_layers.2",
            time_emb_proj="emb_layers.1",
            norm2="out_layers.0",
            conv2="out_layers.3",
            conv_shortcut="skip_connection",
        )

    net, key = pipe.unet, "model.diffusion_model"
    put(net.time_embedding, f"{key}.time_embed", linear_1="0", linear_2="2")
    if kind == "sdxl":
        put(net.add_embedding, f"{key}.label_emb.0", linear_1="0", linear_2="2")
    put(net.conv_in, f"{key}.input_blocks.0.0")
    n = 1
    for block in net.down_blocks:
        for i, r in enumerate(block.resnets):
            resnet(r, f"{key}.input_blocks.{n}.0")
            if hasattr(block, "attentions"):
                put(block.attentions[i], f"{key}.input_blocks.{n}.1")
            n += 1
        for d in block.downsamplers or []:
            put(d.conv, f"{key}.input_blocks.{n}.0.op")
            n += 1
    resnet(net.mid_block.resnets[0], f"{key}.middle_block.0")
    put(net.mid_block.attentions[0], f"{key}.middle_block.1")
    resnet(net.mid_block.resnets[1], f"{key}.middle_block.2")
    n = 0
    for block in net.up_blocks:
        for i, r in enumerate(block.resnets):
            inside = [(resnet, r)] + ([(put, block.attentions[i])] if hasattr(block, "attentions") else [])
            for j, (how, module) in enumerate(inside):
                how(module, f"{key}.output_blocks.{n}.{j}")
            if block.upsamplers and i == len(block.resnets) - 1:
                put(block.upsamplers[0].conv, f"{key}.output_blocks.{n}.{len(inside)}.conv")
            n += 1
    put(net.conv_norm_out, f"{key}.out.0")
    put(net.conv_out, f"{key}.out.2")

    key = "first_stage_model"
    for side, blocks in (("encoder", pipe.vae.encoder.down_blocks), ("decoder", pipe.vae.decoder.up_blocks[::-1])):
        coder, word = getattr(pipe.vae, side), "down" if side == "encoder" else "up"
        put(coder.conv_in, f"{key}.{side}.conv_in")
        put(coder.conv_norm_out, f"{key}.{side}.norm_out")
        put(coder.conv_out, f"{key}.{side}.conv_out")
        for i, block in enumerate(blocks):
            for j, r in enumerate(block.resnets):
                put(r, f"{key}.{side}.{word}.{i}.block.{j}", conv_shortcut="nin_shortcut")
            for s in (block.downsamplers if word == "down" else block.upsamplers) or []:
                put(s.conv, f"{key}.{side}.{word}.{i}.{word}sample.conv")
        put(coder.mid_block.resnets[0], f"{key}.{side}.mid.block_1")
        put(coder.mid_block.resnets[1], f"{key}.{side}.mid.block_2")
        a, at = coder.mid_block.attentions[0], f"{key}.{side}.mid.attn_1"
        put(a.group_norm, f"{at}.norm")
        for m, name in ((a.to_q, "q"), (a.to_k, "k"), (a.to_v, "v"), (a.to_out[0], "proj_out")):
            out[f"{at}.{name}.weight"], out[f"{at}.{name}.bias"] = (
                m.weight.data.clone().view(*m.weight.shape, 1, 1),
                m.bias.data,
            )
    put(pipe.vae.quant_conv, f"{key}.quant_conv")
    put(pipe.vae.post_quant_conv, f"{key}.post_quant_conv")

    if kind == "sd2":
        openclip(pipe.text_encoder, "cond_stage_model.model", out)
    else:
        key = "cond_stage_model.transformer" if kind == "sd1" else "conditioner.embedders.0.transformer"
        for name, x in pipe.text_encoder.state_dict().items():
            out[f"{key}.text_model.{name.removeprefix('text_model.')}"] = x
    if kind == "sdxl":
        openclip(pipe.text_encoder_2, "conditioner.embedders.1.model", out)
    return {k: x.detach().clone().contiguous() for k, x in out.items()}


def openclip(encoder, key, out) -> None:
    model = getattr(encoder, "text_model", encoder)
    out[f"{key}.token_embedding.weight"] = model.embeddings.token_embedding.weight
    out[f"{key}.positional_embedding"] = model.embeddings.position_embedding.weight
    for name in ("weight", "bias"):
        out[f"{key}.ln_final.{name}"] = getattr(model.final_layer_norm, name)
        for i, layer in enumerate(model.encoder.layers):
            at, a = f"{key}.transformer.resblocks.{i}", layer.self_attn
            out[f"{at}.attn.in_proj_{name}"] = torch.cat([getattr(m, name) for m in (a.q_proj, a.k_proj, a.v_proj)])
            out[f"{at}.attn.out_proj.{name}"] = getattr(a.out_proj, name)
            for ours, theirs in (
                (layer.layer_norm1, "ln_1"),
                (layer.layer_norm2, "ln_2"),
                (layer.mlp.fc1, "mlp.c_fc"),
                (layer.mlp.fc2, "mlp.c_proj"),
            ):
                out[f"{at}.{theirs}.{name}"] = getattr(ours, name)
    if hasattr(encoder, "text_projection"):
        out[f"{key}.text_projection"] = encoder.text_projection.weight.T
        out[f"{key}.logit_scale"] = torch.tensor(4.6)


def config_folder(pipe, folder: Path) -> Path:
    """diffusers' folder of a pipeline without its weights, for its own `from_single_file`."""
    pipe.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    assert json.loads((folder / "model_index.json").read_text())
    return folder
