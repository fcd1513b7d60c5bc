"""Simple diffusion: the multiscale loss by its definition, the schedule by resolution, presets, and a small run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import avg_pool2d
from torch.testing import assert_close

import sfumato as sf
from sfumato.errors import BadInput
from sfumato.noise import Cosine, GaussianProcess, Interpolated, Shifted
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.train.simple_diffusion import SimpleDiffusion, multiscale

TINY = {"size": 32, "channels": (8,), "blocks": (1,), "depth": 1, "width": 16, "head_dim": 8, "embedding": 16}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([8, 16, 32]), st.sampled_from([8, 16, 32, 64]), st.integers(0, 2**31))
def test_multiscale_is_the_weighted_sum_over_averaged_pictures(smallest, side, seed):
    """Sum over s of (1 / s) E || D_s[eps] - D_s[eps_hat] ||^2 / s^2, both averaged, one level at a time."""
    eps, guess = normal(2, 3, side, side, seed=seed), normal(2, 3, side, side, seed=seed + 1)
    levels = [s for s in (8, 16, 32, 64) if smallest <= s <= side] or [side]
    pool = lambda x, s: avg_pool2d(x, side // s)
    expected = sum((pool(eps, s) - pool(guess, s)).square().mean((1, 2, 3)) / s for s in levels)
    assert_close(multiscale(guess - eps, smallest), expected)


def test_one_level_is_the_plain_loss():
    r = normal(3, 3, 32, 32)
    assert_close(multiscale(r), r.square().mean((1, 2, 3)) / 32)


def test_averaged_white_noise_has_the_variance_of_its_side():
    """Var(D_s[noise]) = (s / d)^2, so a network that knows nothing has the multiscale loss sum (1 / s) (s / d)^2."""
    n, d = 400, 128
    losses = multiscale(normal(n, 1, d, d))
    expected = sum((s / d) ** 2 / s for s in (32, 64, 128))
    assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(n)


@pytest.mark.parametrize("side", [48, 33, 96 + 32])
def test_multiscale_needs_sides_that_halve(side):
    if side == 128:
        multiscale(normal(1, 1, side, side))
        return
    with pytest.raises(BadInput, match="halves"):
        multiscale(normal(1, 1, side, side))


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_the_loss_is_alpha_squared_times_that_of_v(t, seed):
    recipe = SimpleDiffusion(**TINY)
    process = recipe.process()
    truth = MixtureDenoiser(process, GaussianMixture.isotropic(torch.zeros(1, 3, 2, 2), 0.5), "v")
    x, eps = normal(4, 3, 2, 2, seed=seed), normal(4, 3, 2, 2, seed=seed + 1)
    times = torch.full((4,), t, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t)
    v = alpha * eps - sigma * x
    z = process.diffuse(x, times, eps)
    expected = alpha**2 * (truth(z, times) - v).square().mean((1, 2, 3))
    assert_close(recipe.loss(truth, x, times, eps, None), expected)


def test_the_multiscale_loss_of_the_recipe():
    recipe = SimpleDiffusion(**{**TINY, "size": 64}, multiscale=True)
    blind = lambda z, t, cond: torch.zeros_like(z)
    blind.process, blind.prediction = recipe.process(), "eps"
    x, eps = normal(2, 3, 64, 64), normal(2, 3, 64, 64, seed=1)
    assert_close(recipe.loss(blind, x, torch.full((2,), 0.5), eps, None), multiscale(eps))


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({"noise": "cosine"}, Cosine()),
        ({"noise": "shifted", "noise_size": 16}, Shifted(Cosine(), 16, 32)),
        ({"noise": "shifted", "keep_bounds": True, "logsnr_limit": 10.0}, Shifted(Cosine(-10, 10), 32, 32, True)),
        ({"noise": "interpolated", "noise_size": 8}, Interpolated(Cosine(), 8, 32, 32)),
        ({"noise": "interpolated", "noise_size": 8, "clean_size": 16}, Interpolated(Cosine(), 8, 16, 32)),
    ],
)
def test_schedules(settings, schedule):
    assert SimpleDiffusion(**TINY, **settings).process() == GaussianProcess(schedule)


def test_layout_is_hidden_where_the_schedule_follows_the_resolution():
    """Pictures with one bright and one dark half: at t = 0.9 their layout can be read off z_t at 64 px under the plain
    cosine, with the error of Phi(-SNR of the halves' difference), and under the shifted one as little as at 16 px."""
    n, read = 4000, {}
    for name, side, noise in (("plain", 64, "cosine"), ("shifted", 64, "shifted"), ("small", 16, "cosine")):
        process = SimpleDiffusion(**{**TINY, "size": side}, noise=noise, noise_size=16).process()
        alpha, sigma = process.alpha_sigma(0.9)
        # The difference of the halves' means is a sufficient statistic: +-0.2 alpha, and noise of 2 sigma / side.
        sign = torch.where(normal(n) > 0, 1.0, -1.0)
        statistic = 0.2 * alpha * sign + 2 * sigma / side * normal(n, seed=1)
        read[name] = ((statistic > 0) == (sign > 0)).double().mean().item()
    assert read["plain"] > 0.8
    assert abs(read["shifted"] - read["small"]) < 0.03 < read["plain"] - read["shifted"]


def test_presets_build():
    for name, preset in SimpleDiffusion.presets.items():
        recipe = SimpleDiffusion(**preset)
        with torch.device("meta"):
            net = recipe.network(10)
        small = name.startswith("small")
        assert (sum(p.numel() for p in net.parameters()) < 5e6) == small, name
        bottom = recipe.size // recipe.factor >> len(recipe.channels)
        assert recipe.backbone == "unet" or small or bottom == 16, name


@pytest.mark.parametrize(
    "change", [{"noise_size": 0}, {"variance": 2.0}, {"logsnr_limit": -1.0}, {"sampling_steps": 0}, {"noise_size": -4}]
)
def test_bad_settings(change):
    with pytest.raises(BadInput, match=next(iter(change))):
        SimpleDiffusion(**{**TINY, **change})


@pytest.mark.parametrize("backbone", ["uvit", "unet"])
def test_a_small_run(backbone, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    changes = {"size": 16, "factor": 2, "updates": 2, "batch": 2, "warmup": 1, "attention": (4,), "variance": 0.2}
    recipe = SimpleDiffusion(**{**TINY, **changes}, data=str(tmp_path / "data"), backbone=backbone, save_memory=True)
    recipe.run(tmp_path / "run", progress=False)
    model = sf.load(tmp_path / "run" / "model", "cpu")
    assert model.process == recipe.process()
    assert model.defaults["options"] == {"variance": 0.2} and model.defaults["sampling_steps"] == 512
    assert model.draw(None, [0, 1], sampling_steps=2).shape == (2, 3, 16, 16)
