"""Tiny pipelines of the genuine classes, with random weights, for tests that need a text-to-image model."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

WORDS = ("a", "photo", "of", "red", "blue", "star", "circle", "square", "an", "art")
LENGTH = 12  # context length of the tiny models, start and end tokens included


def shared_data() -> Path:
    """The folder of shared test data: ``../shared/data`` beside the repository, or $SFUMATO_SHARED/data."""
    root = os.environ.get("SFUMATO_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    return Path(root) / "data"


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in GPT-2's order: printable ones first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def clip_tokenizer(folder: Path, merges: list[str], length: int):
    """A genuine CLIPTokenizer with these merges, built in ``folder`` from files that every version reads."""
    from transformers import CLIPTokenizer

    letters = byte_letters()
    entries = [*letters, *(c + "</w>" for c in letters), *("".join(m.split()) for m in merges)]
    vocab = {w: i for i, w in enumerate([*entries, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "pad_token": "<|endoftext|>",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def word_merges(words=WORDS) -> list[str]:
    """Merges that make each word one token, letter by letter from the left."""
    merges: dict[str, None] = {}
    for word in words:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + "</w>" if i == len(word) - 1 else letter
            merges[f"{left} {right}"] = None
            left += right
    return list(merges)


def tiny_text_encoder(tokenizer, projection: bool = False, width: int = 16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=5.0,  # random text encoders hardly tell words apart otherwise
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_scheduler(prediction_type: str):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def tiny_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    ).eval()


def make_tiny_sd(tmp_path_factory, prediction_type: str = "v_prediction", seed: int = 0):
    """A StableDiffusionPipeline of about 100,000 parameters: 16x16 pictures, 4x8x8 latents, 12 tokens."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(tmp_path_factory.mktemp("tokenizer"), word_merges(), LENGTH)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()
        return StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=tiny_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def make_tiny_sdxl(tmp_path_factory, prediction_type: str = "epsilon", seed: int = 0):
    """A StableDiffusionXLPipeline of that size: two text encoders, pooled embeddings, size conditioning."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(tmp_path_factory.mktemp("tokenizer"), word_merges(), LENGTH)
        tokenizer_2 = clip_tokenizer(tmp_path_factory.mktemp("tokenizer_2"), word_merges(), LENGTH)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=40,
            attention_head_dim=(2, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ).eval()
        return StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            text_encoder_2=tiny_text_encoder(tokenizer_2, projection=True, width=24),
            tokenizer_2=tokenizer_2,
            scheduler=tiny_scheduler(prediction_type),
            add_watermarker=False,
        )


def make_tiny_dit():
    """A DiTPipeline: a pipeline whose network is no UNet."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=4
    )
    return DiTPipeline(network, tiny_vae(), DDIMScheduler())


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A tiny SD pipeline behind the adapter (v-prediction). Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap

    return wrap(make_tiny_sd(tmp_path_factory))


@pytest.fixture(scope="session")
def tiny_sd_eps(tmp_path_factory):
    """The same with eps-prediction."""
    from sfumato.pipeline import wrap

    return wrap(make_tiny_sd(tmp_path_factory, prediction_type="epsilon"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A tiny SDXL pipeline behind the adapter (eps-prediction). Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap

    return wrap(make_tiny_sdxl(tmp_path_factory))


@pytest.fixture(scope="session")
def real_clip_tokenizer(tmp_path_factory):
    """The CLIP tokenizer of released checkpoints (49,408 entries), from its published merges; else a skip."""
    file = shared_data() / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
    if not file.exists():
        pytest.skip("the published CLIP merges are not at hand (shared/data/clip_bpe)")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    return clip_tokenizer(tmp_path_factory.mktemp("clip"), lines[1 : 49152 - 256 - 2 + 1], 77)
