"""The embedded pipelines: genuine ones of Stable Diffusion's and PixArt's shape, small, good enough to measure on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

import sfumato as sf
from sfumato.data import oracle, sketch
from sfumato.data.cases import balanced
from sfumato.data.world import WORDS

ASSETS = Path(sf.__file__).parent / "assets"
MODELS = {"sketch": 20e6, "sketch-dit": 12e6}
"""Bytes of weights, at most."""
UNET = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
PIXART = {"transformer": PixArtTransformer2DModel, "text_encoder": T5EncoderModel, "tokenizer": T5TokenizerFast}


@pytest.mark.parametrize(
    ("model", "kind", "parts"), [("sketch", StableDiffusionPipeline, UNET), ("sketch-dit", PixArtSigmaPipeline, PIXART)]
)
def test_it_is_made_of_the_classes_that_everybody_loads(model, kind, parts):
    loaded, folder = sf.load(model), ASSETS / model
    assert type(loaded.pipe) is kind and loaded.origin == model
    assert all(isinstance(getattr(loaded.pipe, name), part) for name, part in parts.items())
    assert isinstance(loaded.pipe.vae, AutoencoderKL) and loaded.pipe.vae_scale_factor == 8
    assert sum(f.stat().st_size for f in folder.rglob("*.safetensors")) <= MODELS[model]
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt")]


@pytest.mark.parametrize("model", MODELS)
def test_every_word_of_the_world_is_one_token(model):
    loaded = sf.load(model)
    words = [w for group in WORDS.values() for w in group]
    ids = loaded.tokenizers[0](words, add_special_tokens=False).input_ids
    assert all(len(found) == 1 for found in ids) and loaded.vocabulary == WORDS


@pytest.mark.parametrize("model", MODELS)
def test_pictures_follow_the_prompt_more_often_than_chance(model):
    """Sixteen pictures, ten steps: a pipeline that ignored its prompt would name one object in twelve right."""
    rng = torch.Generator().manual_seed(0)
    asked = {a: balanced(words, 16, rng) for a, words in WORDS.items()}
    prompts = [sketch.prompt(**{a: asked[a][i] for a in WORDS}) for i in range(16)]
    pictures = sf.load(model).draw(prompts, range(16), sampling_steps=10)
    assert pictures.shape == (16, 3, 64, 64)
    read = oracle.load()(pictures)
    for attribute, words in WORDS.items():
        names = oracle.WORDS[attribute]
        hits = sum(names[int(i)] == w for i, w in zip(read[attribute].argmax(1), asked[attribute], strict=True))
        # Chance is 16 / len(words); by chance, more than half right has probability below 2e-3 even for five words.
        assert hits > 8, (attribute, hits, len(words))
