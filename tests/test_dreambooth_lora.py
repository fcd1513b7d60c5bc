"""DreamBooth with low-rank products: what is said, what is kept, what is trained."""

from __future__ import annotations

import pytest
import torch

from sfumato.customize import AnchoredComposition, DreamBoothLoRA
from sfumato.customize.parts.products import on_attention

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_class_nouns_stand_behind_the_word(tiny_sd):
    method = DreamBoothLoRA(init_word="star")
    said = method.texts(tiny_sd, ["", "a red star", "a {} on a square", "a photo of <mine>"])
    assert said == [["a photo of {} star"], ["a red {} star"], ["a {} star on a square"], ["a photo of {} star"]]
    assert method.told("a <mine> star on a {} star") == "a {} star on a {} star"
    assert method.told("{} stars, {} starfish") == "{} stars, {} star starfish"
    assert DreamBoothLoRA().told("a photo of <mine>") == "a photo of {}"  # no class is named


def test_the_identifier_is_as_long_as_words_and_fixed(tiny_sdxl):
    method = DreamBoothLoRA(**DreamBoothLoRA.EXAMPLE)
    rows, learned = method.identifier(tiny_sdxl), method.learn(tiny_sdxl, PICTURES)
    assert all(torch.equal(a, b) for a, b in zip(rows, learned.words["<mine>"], strict=True))
    for row, name in zip(rows, ("text_encoder", "text_encoder_2"), strict=True):
        norms = getattr(tiny_sdxl.pipe, name).get_input_embeddings().weight.norm(dim=1)
        torch.testing.assert_close(row.norm(), norms.median())


def test_products_on_every_projection_of_attention(tiny_sd):
    learned = DreamBoothLoRA(**DreamBoothLoRA.EXAMPLE).learn(tiny_sd, PICTURES)
    assert set(learned.products) == {p.name for p in tiny_sd.projections()}
    assert all(x.rank == 2 and x.up.abs().max() > 0 for x in learned.products.values())


def test_products_start_as_in_diffusers_scripts(tiny_sdxl):
    pipe = tiny_sdxl.copy()
    for rank in (2, 8):
        adapter = on_attention(pipe, rank, seed=0)
        down = torch.cat([x.detach().flatten() for x in adapter.down.values()])
        assert float(down.std()) == pytest.approx(1 / rank, rel=0.02) and abs(float(down.mean())) < 0.02 / rank
        assert float(down.abs().max()) > 3 / rank and not any(x.any() for x in adapter.up.values())
        adapter.remove()


def test_the_class_weighs_as_said(tiny_sd):
    settings = {**DreamBoothLoRA.EXAMPLE, "updates": 1}
    of = lambda **more: DreamBoothLoRA(**{**settings, **more}).learn(tiny_sd, PICTURES).about["losses"][0]
    alone, once, twice = of(n_prior=0), of(), of(prior_weight=2.0)
    assert once > alone and abs((twice - alone) - 2 * (once - alone)) < 1e-5


def test_the_defaults_are_those_of_diffusers_script():
    scripts = {"lr": 5e-4, "weight_decay": 1e-2, "clip_norm": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "warmup": 0,
               "rank": 4, "n_prior": 100, "prior_weight": 1.0, "flip": 0.0}  # fmt: skip
    readmes = {"batch": 1, "updates": 500}
    method = DreamBoothLoRA(**DreamBoothLoRA.presets["diffusers"])
    assert {name: getattr(method, name) for name in (*scripts, *readmes)} == {**scripts, **readmes}
    assert AnchoredComposition().flip == 0
