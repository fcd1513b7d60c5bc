"""The text-to-image recipe: tokenizer, loss, and the whole of it at a tiny size."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sfumato.errors import BadInput
from sfumato.pipeline import wrap
from sfumato.train.diffusion import DiffusionRecipe, scheduler
from sfumato.train.parent import chain
from sfumato.train.shapes import SHAPES
from sfumato.train.t2i import TrainT2I
from sfumato.train.tokenizer import learn_pieces, learn_tokenizer


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


def loss_and_times(
    gamma: float, tilt: float, power: float = 1.0, n: int = 4000
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The loss of a network that predicts nothing, the times that it was asked at, and the squared error of each."""
    asked = {}

    class Nought(nn.Module):
        device = torch.device("cpu")

        def forward(self, z, t, tokens):
            asked["t"] = t
            return type("Output", (), {"sample": torch.zeros_like(z)})

    text = lambda ids: type("Output", (), {"last_hidden_state": ids})
    latents = torch.zeros(6, 4, 1, 1)  # so that the error is alpha eps
    recipe = DiffusionRecipe(
        Nought(), text, learn_tokenizer(["a"], 4, 600), scheduler(), latents, ["a"] * 6, 0.1, gamma, 2, tilt, power
    )
    rng = torch.Generator().manual_seed(0)
    batch = recipe.batch(0, rng, n)
    return float(recipe.loss(batch, rng)[0]), asked["t"], scheduler().alphas_cumprod[asked["t"]]


def test_without_gamma_every_time_weighs_the_same():
    plain, _, alpha2 = loss_and_times(0.0, 0.0)
    # The mean of alpha^2 eps^2; its deviation is at most sqrt(3 - 1) for each of 16,000 numbers.
    assert abs(plain - float(alpha2.mean())) < 5 * (2 / 16_000) ** 0.5
    weight = (snr := alpha2 / (1 - alpha2)).clamp(max=5) / (snr + 1)
    for power in (1.0, 0.5):
        weighed, _, _ = loss_and_times(5.0, 0.0, power)
        assert abs(weighed - float((alpha2 * weight**power).mean())) < 5 * (2 / 16_000) ** 0.5


@pytest.mark.parametrize("tilt", [0.0, 1.0, 3.0])
def test_tilt_draws_noisy_times_more_often(tilt):
    _, t, _ = loss_and_times(0.0, tilt)
    # The distribution function is time^(1 + tilt).
    for quantile in (0.25, 0.5, 0.75):
        share = float((t < 1000 * quantile).float().mean())
        assert abs(share - quantile ** (1 + tilt)) < 5 * 0.5 / len(t) ** 0.5
    assert t.max() <= 999


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TrainT2I:
    """The recipe at a tiny size, on three captioned pictures."""
    rng, data = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for name in ("red box", "blue box", "a dot"):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(data / f"{name}.png")
    return TrainT2I(
        data=str(data), size=16, autoencoder_channels=(8, 8, 8, 8), autoencoder_updates=2, updates=2,
        autoencoder_batch=2, batch=2, channels=(16, 16), text_width=16, context=8, vocabulary=560, precision="no",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    return tiny.run(tmp_path_factory.mktemp("trained"), progress=False)


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / part).glob("*.safetensors")))


def same(a: Path, b: Path, part: str) -> bool:
    left, right = weights(a, part), weights(b, part)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_recipe_from_a_folder_to_a_pipeline(trained):
    """Both stages at a tiny size; the result is a pipeline that diffusers loads and samples."""
    pipe = StableDiffusionPipeline.from_pretrained(trained, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red box", num_inference_steps=2, height=16, width=16, output_type="np").images[0]
    assert image.shape == (16, 16, 3)
    assert not list(trained.rglob("*.bin"))


def test_pieces_know_their_words_and_spell_others():
    captions = ["a red star", "a Blue moon, chalk style"]
    tokenizer = learn_pieces(captions, context=12, vocabulary=600)
    assert tokenizer.tokenize("a red moon, chalk") == ["\u2581a", "\u2581red", "\u2581moon", ",", "\u2581chalk"]
    assert len(tokenizer.tokenize("xylo")) == 5 and tokenizer.unk_token_id not in tokenizer("xylo 7-9").input_ids
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    small = learn_pieces(captions, context=12, vocabulary=len(tokenizer) - 3)
    assert len(small) == len(tokenizer) - 3 and "\u2581a" in small.get_vocab()


def test_a_transformer_is_trained_as_a_pipeline_calls_it(tiny, trained, tmp_path):
    """The autoencoder of another; the network's call in training is the adapter's, masked words and all."""
    recipe = replace(
        tiny, architecture="pixart", width=32, blocks=1, text_layers=1, start_from=str(trained),
        start_with="autoencoder", autoencoder_updates=0, seed=1,
    )  # fmt: skip
    folder = recipe.run(tmp_path / "run", progress=False)
    assert same(trained, folder, "vae")
    pipe = PixArtSigmaPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    asked = {"use_resolution_binning": False, "height": 16, "width": 16, "output_type": "np"}
    assert pipe("a red box", num_inference_steps=2, **asked).images[0].shape == (16, 16, 3)
    p, shape = wrap(pipe), SHAPES["pixart"]
    assert p.denoiser.prediction == "v" and p.size == 16
    z, prompts = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(0)), ["a Red box ", ""]
    tokenizer = p.tokenizers[0]
    ids, t = shape.ids(tokenizer, prompts), torch.tensor([300, 300])
    trained_as = shape.predict(pipe.transformer, pipe.text_encoder, z, t, ids)
    called_as = p.anatomy.call(z, t, p.encode(prompts))
    torch.testing.assert_close(trained_as, called_as, atol=1e-5, rtol=1e-4)
    with pytest.raises(BadInput, match="has no transformer"):
        replace(recipe, start_with="all").run(tmp_path / "all", progress=False)
    with pytest.raises(BadInput, match="multiple of 32"):
        replace(recipe, width=40)


def test_training_goes_on_from_a_pipeline(tiny, trained, tmp_path):
    """At a learning rate next to nothing the second stage gives back what it started from: weights and tokenizer."""
    recipe = replace(tiny, start_from=str(trained), autoencoder_updates=0, lr=1e-30, seed=1)
    child = recipe.run(tmp_path / "run", progress=False)
    assert all(same(trained, child, part) for part in ("vae", "unet", "text_encoder"))
    assert (child / "tokenizer" / "vocab.json").read_bytes() == (trained / "tokenizer" / "vocab.json").read_bytes()
    vae = [json.loads((f / "vae" / "config.json").read_text())["scaling_factor"] for f in (trained, child)]
    assert vae[0] == vae[1]
    trained_on = replace(recipe, lr=1e-3).run(tmp_path / "more", progress=False)
    assert same(trained, trained_on, "vae") and not same(trained, trained_on, "unet")


def test_the_chain_of_commands_is_recorded(tiny, trained, tmp_path):
    first = json.loads((trained / "sfumato.json").read_text())
    child = replace(tiny, start_from=str(trained), seed=1).run(tmp_path / "child", progress=False)
    grandchild = replace(tiny, start_from=str(child), seed=2).run(tmp_path / "grandchild", progress=False)
    made = json.loads((grandchild / "sfumato.json").read_text())["provenance"]
    assert [made["config"]["seed"], made["parent"]["config"]["seed"]] == [2, 1]
    assert [step["config"]["seed"] for step in chain(made)] == [0, 1, 2]
    assert made["parent"]["parent"] == {**first["provenance"], "sha256": first["description"]["sha256"]}


def test_only_the_autoencoder_may_be_taken_over(tiny, trained, tmp_path):
    """Another U-Net on the same autoencoder; the same as from scratch, apart from the first stage."""
    recipe = replace(tiny, start_from=str(trained), start_with="autoencoder", channels=(32,), autoencoder_updates=0)
    child = recipe.run(tmp_path / "run", progress=False)
    assert same(trained, child, "vae") and weights(child, "unet")["conv_in.weight"].shape[0] == 32


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"channels": (32, 16)}, "channels, layers, latent_channels and text_width"),
        ({"context": 12}, "text_width, text_layers and context"),
        ({"autoencoder_channels": (8, 8, 8, 16)}, "autoencoder_channels"),
    ],
)
def test_a_parent_that_does_not_fit_is_refused_before_anything_is_written(tiny, trained, tmp_path, change, named):
    with pytest.raises(BadInput, match=named):
        replace(tiny, start_from=str(trained), **change).run(tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_untrained_autoencoder_cannot_be_kept(tiny, trained, tmp_path):
    with pytest.raises(BadInput, match="start_from"):
        replace(tiny, autoencoder_updates=0)
    run = trained.parent
    with pytest.raises(BadInput, match="trained its autoencoder"):
        replace(tiny, start_from=str(trained), autoencoder_updates=0).run(run, progress=False, overwrite=True)


def test_latents_of_another_autoencoder_are_made_again(tiny, trained, tmp_path):
    """A run killed before its second stage, then given another parent."""
    other = replace(tiny, autoencoder_updates=3, seed=5).run(tmp_path / "other", progress=False)
    (tmp_path / "run").mkdir()
    shutil.copy(trained.parent / "latents.safetensors", tmp_path / "run")
    kept = load_file(tmp_path / "run" / "latents.safetensors")["latents"]
    replace(tiny, start_from=str(other), autoencoder_updates=0).run(tmp_path / "run", progress=False)
    assert not torch.equal(load_file(tmp_path / "run" / "latents.safetensors")["latents"], kept)


def test_data_that_changed_since_are_refused(tiny, tmp_path):
    """A picture more, before the others: it would shift the captions of latents that are kept."""
    shutil.copytree(tiny.data, tmp_path / "data")
    recipe = replace(tiny, data=str(tmp_path / "data"), updates=1, autoencoder_updates=1)
    recipe.run(tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "pipeline")
    shutil.copy(tmp_path / "data" / "a dot.png", tmp_path / "data" / "a bee.png")
    for stage in ("autoencoder", "diffusion"):
        with pytest.raises(BadInput, match=f"{stage} holds a run with rows='3 with SHA-256 .*rows='4 with"):
            recipe.run(tmp_path / "run", progress=False)
        shutil.rmtree(tmp_path / "run" / stage)


def test_latents_of_other_rows_are_made_again(tiny, trained, tmp_path):
    """As many as before, one of another name: after a kill between the stages nothing else tells."""
    shutil.copytree(tiny.data, tmp_path / "data")
    recipe = replace(tiny, data=str(tmp_path / "data"), start_from=str(trained), autoencoder_updates=0, updates=1)
    recipe.run(tmp_path / "run", progress=False)
    kept = load_file(tmp_path / "run" / "latents.safetensors")["latents"]
    shutil.rmtree(tmp_path / "run" / "pipeline")
    shutil.rmtree(tmp_path / "run" / "diffusion")
    (tmp_path / "data" / "a dot.png").rename(tmp_path / "data" / "the dot.png")
    recipe.run(tmp_path / "run", progress=False)
    again = load_file(tmp_path / "run" / "latents.safetensors")["latents"]
    torch.testing.assert_close(again, kept[[1, 2, 0]])


def test_both_stages_have_the_loop_s_settings(tiny):
    first = replace(tiny, batch=8, accumulate=4, workers=5)._first()
    assert (first.workers, first.accumulate) == (5, tiny.autoencoder_batch)


def test_plan_states_memory_and_time():
    plan = TrainT2I(size=16, channels=(16, 16), text_width=16, autoencoder_channels=(8, 8, 8, 8)).plan()
    shown = dict(plan.lines())
    assert "memory: optimiser" in shown and "time" in shown and plan.seconds > 0
