"""The text-to-image recipe: tokenizer, loss, and the whole of it at a tiny size."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from sfumato.train.t2i import DiffusionRecipe, TrainT2I, scheduler
from sfumato.train.tokenizer import learn_tokenizer


def test_tokenizer_knows_its_words_and_spells_others():
    tokenizer = learn_tokenizer(["a red star", "a blue moon, chalk style"], context=12, vocabulary=600)
    ids = tokenizer("a red moon").input_ids
    assert len(ids) == 5 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert len(tokenizer("xylophone").input_ids) > 3
    assert tokenizer("Red STAR").input_ids == tokenizer("red star").input_ids


def test_v_loss_vanishes_for_the_true_velocity():
    """A network that returns alpha eps - sigma x for known x has zero loss, whatever the weights."""
    table = scheduler().alphas_cumprod
    latents = torch.full((6, 4, 2, 2), 0.5)

    class Oracle(nn.Module):
        device = torch.device("cpu")

        def forward(self, z, t, tokens):
            alpha, sigma = table[t].sqrt()[:, None, None, None], (1 - table[t]).sqrt()[:, None, None, None]
            eps = (z - alpha * 0.5) / sigma
            return type("Output", (), {"sample": alpha * eps - sigma * 0.5})

    text = lambda ids: type("Output", (), {"last_hidden_state": ids})
    tokenizer = learn_tokenizer(["a"], 4, 600)
    recipe = DiffusionRecipe(Oracle(), text, tokenizer, scheduler(), latents, ["a"] * 6, 0.1, 5.0)
    rng = torch.Generator().manual_seed(0)
    loss, _ = recipe.loss(recipe.batch(0, rng, 16), rng)
    assert loss < 1e-9


def test_recipe_from_a_folder_to_a_pipeline(tmp_path):
    """Both stages at a tiny size, stopped and resumed; the result is a pipeline that diffusers loads and samples."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name in ("red box", "blue box", "a dot"):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{name}.png")
    recipe = TrainT2I(
        data=str(tmp_path / "data"),
        size=16,
        autoencoder_channels=(8, 8, 8, 8),
        autoencoder_steps=2,
        steps=2,
        autoencoder_batch=2,
        batch=2,
        channels=(16, 16),
        text_width=16,
        context=8,
        vocabulary=560,
        precision="no",
    )
    folder = recipe.run(tmp_path / "run", progress=False)
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red box", num_inference_steps=2, height=16, width=16, output_type="np").images[0]
    assert image.shape == (16, 16, 3)
    assert not list(folder.rglob("*.bin"))


def test_plan_states_memory_and_time():
    plan = TrainT2I(size=16, channels=(16, 16), text_width=16, autoencoder_channels=(8, 8, 8, 8)).plan()
    shown = dict(plan.lines())
    assert "memory: optimiser" in shown and "time" in shown and plan.seconds > 0
