"""The embedded pipeline: a genuine Stable-Diffusion-shaped one, small, and good enough to be measured on."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

import sfumato as sf
from sfumato.data import oracle, sketch
from sfumato.data.cases import balanced
from sfumato.data.world import WORDS

ASSET = Path(sf.__file__).parent / "assets" / "sketch"


def test_it_is_made_of_the_classes_that_everybody_loads():
    pipe = sf.load("sketch").pipe
    assert type(pipe) is StableDiffusionPipeline
    parts = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    assert all(isinstance(getattr(pipe, k), kind) for k, kind in parts.items())
    assert isinstance(pipe.tokenizer, CLIPTokenizer)
    assert pipe.vae_scale_factor == 8
    assert sum(f.stat().st_size for f in ASSET.rglob("*.safetensors")) <= 25e6
    assert not [f for f in ASSET.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt")]


def test_every_word_of_the_world_is_one_token():
    tokenizer = sf.load("sketch").pipe.tokenizer
    words = [w for group in WORDS.values() for w in group]
    assert all(len(tokenizer(w).input_ids) == 3 for w in words)


def test_pictures_follow_the_prompt_more_often_than_chance():
    """Sixteen pictures, ten steps: a pipeline that ignored its prompt would name one object in twelve right."""
    rng = torch.Generator().manual_seed(0)
    asked = {a: balanced(words, 16, rng) for a, words in WORDS.items()}
    prompts = [sketch.prompt(**{a: asked[a][i] for a in WORDS}) for i in range(16)]
    pictures = sf.load("sketch").draw(prompts, range(16), sampling_steps=10)
    assert pictures.shape == (16, 3, 64, 64)
    read = oracle.load()(pictures)
    for attribute, words in WORDS.items():
        names = oracle.WORDS[attribute]
        hits = sum(names[int(i)] == w for i, w in zip(read[attribute].argmax(1), asked[attribute], strict=True))
        # Chance is 16 / len(words); by chance, more than half right has probability below 2e-3 even for five words.
        assert hits > 8, (attribute, hits, len(words))
