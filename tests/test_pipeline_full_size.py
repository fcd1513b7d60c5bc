"""Full-size shapes, with random weights or none: what the tiny pipelines cannot show."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from conftest import clip_tokenizer, t5_tokenizer, tiny_scheduler, word_merges
from sfumato.pipeline import Conditioning, load, wrap
from sfumato.pipeline.anatomy import UNetAnatomy

SD = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407,
}  # fmt: skip
CLIP_G = {
    **CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip


def random_weights(module, dtype, seed=0):
    """Give a module without storage small random weights, far faster than its own initialisation."""
    generator = torch.Generator().manual_seed(seed)
    module = module.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, x in module.named_parameters():
            norm_weight = x.ndim == 1 and name.endswith("weight")
            x.fill_(1.0) if norm_weight else x.uniform_(-0.02, 0.02, generator=generator)
    for name, x in module.named_buffers():
        assert name.endswith("position_ids"), name
        x.copy_(torch.arange(x.shape[-1]).expand_as(x))
    return module.eval()


def empty(make):
    with init_empty_weights(include_buffers=False):
        return make()


def test_projections_of_sd1():
    network = empty(lambda: UNet2DConditionModel(**SD))
    found = UNetAnatomy(network).projections(("cross.k", "cross.v"))
    assert len(found) == 32 and {q.shape[1] for q in found} == {768}
    # Five layers each of width 320 at side 64, 640 at 32, 1280 at 16, and the middle block at 8.
    assert sorted((q.resolution, q.shape[0]) for q in found) == sorted(
        2 * ([(64, 320)] * 5 + [(32, 640)] * 5 + [(16, 1280)] * 5 + [(8, 1280)])
    )


def test_projections_of_sdxl():
    network = empty(lambda: UNet2DConditionModel(**SDXL))
    found = UNetAnatomy(network).projections(("cross.k", "cross.v"))
    assert len(found) == 140 and {q.shape[1] for q in found} == {2048}
    # Width 640 at side 64: 2 layers deep, 5 places. Width 1280 at 32: 10 deep, 5 places and the middle block.
    assert sorted((q.resolution, q.shape[0]) for q in found) == sorted(
        2 * ([(64, 640)] * 10 + [(32, 1280)] * 60)
    )


def clip(config, projection=True):
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**config))


def t5_xxl():
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def published(family, tmp_path):
    """A pipeline with the published configuration, none of whose weights has storage."""
    tokenizer = clip_tokenizer(tmp_path, word_merges(), 77)
    flow, table = FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_scheduler("epsilon")
    with torch.device("meta"):
        if family == "pixart":
            network = PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False)
            vae = AutoencoderKL(**VAE, scaling_factor=0.13025)
            return PixArtSigmaPipeline(t5_tokenizer(), t5_xxl(), vae, network, table)
        vae = AutoencoderKL(**{**VAE, "latent_channels": 16}, shift_factor=0.0609, use_quant_conv=False)
        if family == "flux":
            network = FluxTransformer2DModel(guidance_embeds=True)
            return FluxPipeline(flow, vae, clip(CLIP_L, False), tokenizer, t5_xxl(), t5_tokenizer(), network)
        network = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        )
        encoders = (clip(CLIP_L), tokenizer, clip(CLIP_G), tokenizer, t5_xxl(), t5_tokenizer())
        return StableDiffusion3Pipeline(network, flow, vae, *encoders)


@pytest.mark.parametrize(
    ("family", "parameters", "latent", "lengths", "read", "pooled"),
    [
        ("pixart", 610_856_096, (4, 128, 128), [300], (1152, 4096), None),
        ("sd3", 2_028_328_000, (16, 128, 128), [77, 77, 256], (1536, 4096), 2048),
        pytest.param(
            "flux", 11_901_408_320, (16, 128, 128), [77, 512], (3072, 4096), 768, marks=pytest.mark.slow
        ),
    ],
)
def test_families_with_published_configurations(family, parameters, latent, lengths, read, pooled, tmp_path):
    p = wrap(published(family, tmp_path))
    assert (p.size, p.latent_shape(), p.text_lengths()) == (1024, latent, lengths)
    assert sum(x.numel() for x in p.parameters("full").values()) == parameters
    (projection,) = p.projections("text.in")
    assert projection.shape == read
    rows = lengths[-1] + (77 if family == "sd3" else 0)
    ids = torch.zeros(2, rows, dtype=torch.long, device="meta")
    cond = Conditioning(torch.zeros(2, rows, 4096, device="meta"), ids, ids.bool())
    cond = cond.replace(pooled=torch.zeros(2, pooled, device="meta") if pooled else None)
    z = torch.zeros(2, *latent, device="meta")
    with torch.no_grad():
        assert p.denoiser(z, 0.5, cond).shape == z.shape


@pytest.mark.slow
def test_sd1_takes_a_step_and_survives_saving(real_clip_tokenizer, tmp_path):
    p = wrap(
        StableDiffusionPipeline(
            vae=random_weights(empty(lambda: AutoencoderKL(**VAE)), torch.float32),
            text_encoder=random_weights(
                empty(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L))), torch.float32
            ),
            tokenizer=real_clip_tokenizer,
            unet=random_weights(empty(lambda: UNet2DConditionModel(**SD)), torch.float32),
            scheduler=tiny_scheduler("epsilon"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
    assert (p.size, p.latent_shape(), p.context_length) == (512, (4, 64, 64), 77)
    assert sum(x.numel() for x in p.parameters("full").values()) == 859_520_964
    cond = p.encode("a photo of a tench, by Van Gogh")
    assert cond.tokens.shape == (1, 77, 768)
    last = int(cond.ids[0, p.last_word_token(cond)])
    assert p.pipe.tokenizer.decode([last]) == "gogh"
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        step = p.denoiser(z, 0.5, cond)
        expected = p.pipe.unet(z, 499, encoder_hidden_states=cond.tokens).sample
    assert torch.equal(step, expected) and step.isfinite().all()
    copy = p.copy("xattn-strict")
    assert sum(x.requires_grad for x in copy.parameters("full").values()) == 32
    del copy
    folder = p.save(tmp_path / "model")
    sha = p.describe()["sha256"]
    del p
    again = load(folder, device="cpu")
    assert again.describe()["sha256"] == sha
    with torch.no_grad():
        assert torch.equal(again.denoiser(z, 0.5, again.encode("a photo of a tench, by Van Gogh")), step)


@pytest.mark.slow
def test_sdxl_takes_a_step_in_bfloat16(real_clip_tokenizer):
    make = lambda kind, config, dtype: random_weights(empty(lambda: kind(config)), dtype)
    p = wrap(
        StableDiffusionXLPipeline(
            vae=random_weights(empty(lambda: AutoencoderKL(**VAE)), torch.float32),
            text_encoder=make(CLIPTextModel, CLIPTextConfig(**CLIP_L), torch.bfloat16),
            text_encoder_2=make(CLIPTextModelWithProjection, CLIPTextConfig(**CLIP_G), torch.bfloat16),
            tokenizer=real_clip_tokenizer,
            tokenizer_2=real_clip_tokenizer,
            unet=random_weights(empty(lambda: UNet2DConditionModel(**SDXL)), torch.bfloat16),
            scheduler=tiny_scheduler("epsilon"),
            add_watermarker=False,
        )
    )
    assert (p.size, p.latent_shape(), p.context_length) == (1024, (4, 128, 128), 77)
    assert sum(x.numel() for x in p.parameters("full").values()) == 2_567_463_684
    cond = p.encode("a photo of a tench")
    assert cond.tokens.shape == (1, 77, 2048) and cond.pooled.shape == (1, 1280)
    assert cond.size_ids.tolist() == [[1024, 1024, 0, 0, 1024, 1024]]
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        step = p.denoiser(z, 0.5, cond)
        added = {"text_embeds": cond.pooled, "time_ids": cond.size_ids.bfloat16()}
        expected = p.pipe.unet(
            z.bfloat16(), 499, encoder_hidden_states=cond.tokens, added_cond_kwargs=added
        ).sample
    assert step.dtype == torch.float32 and step.isfinite().all()
    assert torch.equal(step, expected.float())
