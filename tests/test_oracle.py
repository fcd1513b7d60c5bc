"""The shipped oracle: reads fresh renders, says "nothing" where nothing is, and is what its card says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sfumato.data import oracle as module
from sfumato.data.oracle.recipe import EVALUATION_SEED, accuracy, confusion, empty_rate, train_oracle
from sfumato.data.sketch import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Scene, render, sample_scene
from sfumato.errors import BadInput, SfumatoError
from sfumato.files import sha256_of

# Seeds of the test file's own renders; neither the training nor the card's evaluation uses them.
FRESH = EVALUATION_SEED + 17


@pytest.fixture(scope="module")
def oracle() -> module.Oracle:
    return module.load()


def pictures(n: int, size: int = 64, seed: int = FRESH) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    stack = np.stack([render(sample_scene(rng, 1), size) for _ in range(n)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255


def test_reads_500_fresh_renders(oracle):
    scores = accuracy(confusion(oracle, 500, seed=FRESH))
    # At a true rate of 99.5 % fewer than 98 % of 500 come out right once in 10,000 trials.
    assert all(score >= 0.98 for score in scores.values()), scores


@pytest.mark.slow
def test_reads_10000_fresh_renders(oracle):
    scores = accuracy(confusion(oracle, 10_000, seed=FRESH + 1))
    assert all(score >= 0.995 for score in scores.values()), scores


def test_words_cover_the_world_and_nothing_comes_last(oracle):
    assert oracle.words("object") == (*OBJECTS, "nothing")
    assert oracle.words("colour") == (*COLOURS, "nothing")
    assert oracle.words("background") == BACKGROUNDS
    assert oracle.words("style") == (*STYLES, "nothing")
    readings = oracle(pictures(3))
    assert {k: tuple(v.shape) for k, v in readings.items()} == {
        name: (3, len(oracle.words(name))) for name in ("object", "colour", "background", "style")
    }
    with pytest.raises(BadInput, match="not 'mood'"):
        oracle.words("mood")


def test_bare_backgrounds_read_nothing(oracle):
    assert empty_rate(oracle) == 1.0
    bare = [render(Scene((), b, "flat")) for b in BACKGROUNDS]
    images = torch.from_numpy(np.stack(bare)).permute(0, 3, 1, 2).float() / 255
    readings = oracle(images)
    assert [BACKGROUNDS[i] for i in readings["background"].argmax(1)] == list(BACKGROUNDS)
    for name in ("colour", "style"):
        assert all(oracle.words(name)[i] == "nothing" for i in readings[name].argmax(1))


def test_noise_reads_nothing(oracle):
    noise = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    nothing = oracle(noise)["object"].argmax(1) == len(OBJECTS)
    assert nothing.float().mean() > 0.9


@pytest.mark.parametrize("size", [128, 256])
def test_other_sizes_are_resized_inside(oracle, size):
    small, large = oracle(pictures(100, 64)), oracle(pictures(100, size))
    for name in small:
        assert (small[name].argmax(1) == large[name].argmax(1)).float().mean() >= 0.97


def test_features_feed_the_heads_and_are_differentiable(oracle):
    images = pictures(4).requires_grad_()
    features = oracle.features(images)
    assert features.shape == (4, module.FEATURES) and (features >= 0).all()
    assert torch.equal(oracle.heads["style"](features), oracle(images)["style"])
    features.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in oracle.parameters()) and not oracle.training


def test_a_picture_reads_alike_alone_and_in_a_batch(oracle):
    images = pictures(5)
    together, alone = oracle(images), oracle(images[2:3])
    for name in together:
        torch.testing.assert_close(together[name][2:3], alone[name], rtol=1e-4, atol=1e-4)


def test_bad_pictures_are_refused(oracle):
    with pytest.raises(BadInput, match="float pictures"):
        oracle(torch.zeros(3, 64, 64))
    with pytest.raises(BadInput, match="uint8"):
        oracle(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_card_matches_the_weights(oracle, tmp_path):
    card = oracle.card
    assert (module.ASSETS / module.WEIGHTS).stat().st_size <= 2_000_000
    assert sha256_of(module.ASSETS / module.WEIGHTS) == card["sha256"]
    assert card["n"] == 10_000 and all(score >= 0.995 for score in card["accuracy"].values())
    assert {k: tuple(v) for k, v in card["reads"].items()} == module.WORDS
    (tmp_path / module.WEIGHTS).write_bytes((module.ASSETS / module.WEIGHTS).read_bytes()[:-1] + b"\0")
    (tmp_path / module.CARD).write_text(json.dumps(card))
    with pytest.raises(SfumatoError, match="not those of its card"):
        module.load(tmp_path)


def test_training_is_deterministic_and_writes_what_load_reads(tmp_path):
    for name in ("a", "b"):
        train_oracle(tmp_path / name, seed=3, steps=1, n_test=10, log=lambda line: None)
    first, second = module.load(tmp_path / "a"), module.load(tmp_path / "b")
    assert first.card["sha256"] == second.card["sha256"]
    assert torch.equal(first(pictures(2))["object"], second(pictures(2))["object"])
