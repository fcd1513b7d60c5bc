"""What every sampler promises: the right Gaussian in the limit, at the order it states, on every kind of model."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sfumato import catalog
from sfumato.errors import BadInput
from sfumato.nets import UNet, VideoUNet
from sfumato.noise import BlurringProcess, Cosine, DiscreteSchedule, GaussianProcess
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel, VideoModel
from sfumato.sample import ddim, from_scheduler, times

from .conftest import call, draw, state

VERB = "sample"
SUITS = lambda cls: not getattr(cls, "tokens", False)  # those have promises of their own, in tests/test_jys.py
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
PROCESS = GaussianProcess(Cosine())
START, END, MEAN, STD = 0.9, 0.1, 0.4, 0.5
DATA = GaussianMixture.isotropic(torch.full((1, 1), MEAN), STD)


def pytest_generate_tests(metafunc) -> None:
    """``sampler``: every sampler with each of its EXAMPLES."""
    if "sampler" in metafunc.fixturenames:
        found = [(m.name, m.load()) for m in catalog.methods(VERB) if SUITS(m.load())]
        every = [(name, cls(**settings)) for name, cls in found for settings in getattr(cls, "EXAMPLES", ({},))]
        metafunc.parametrize("sampler", [s for _, s in every], ids=[f"{name}-{i}" for i, (name, _) in enumerate(every)])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def moments(sampler: Any, steps: int, n: int) -> tuple[float, float]:
    """(mean, variance) of samples from ``START`` to ``END`` of Gaussian data, whose steps are affine.

    The starting points' mean and spread go through the map exactly; what fresh noise adds is estimated from n rows.
    """
    alpha, sigma = (float(x) for x in PROCESS.alpha_sigma(START))
    mean, std = alpha * MEAN, math.sqrt(alpha**2 * STD**2 + sigma**2)
    grid = times.uniform(steps, START, END)
    run = lambda x: sampler(MixtureDenoiser(PROCESS, DATA), torch.full((n, 1), x).double(), grid, generator=rng())
    low, high = run(mean - std), run(mean + std)
    gain = float((high - low)[0] / (2 * std))
    middle = (low + high) / 2
    return float(middle.mean()), (gain * std) ** 2 + (float(middle.var()) if sampler.noisy else 0.0)


def test_it_has_the_signature_of_all_samplers(method):
    names = list(inspect.signature(method.__call__).parameters)
    assert names[1:7] == ["denoiser", "z", "times", "cond", "generator", "callback"]
    assert isinstance(method().noisy, bool) and method().order >= 1


def test_it_converges_to_the_right_gaussian_at_the_order_it_states(sampler):
    alpha, sigma = (float(x) for x in PROCESS.alpha_sigma(END))
    exact = alpha**2 * STD**2 + sigma**2
    if not sampler.noisy:
        errors = [abs(moments(sampler, steps, 2)[1] - exact) for steps in (32, 64, 128)]
        rates = [math.log2(a / b) for a, b in pairwise(errors)]
        assert min(rates) > sampler.order - 0.2, (errors, rates)
        assert abs(moments(sampler, 128, 2)[0] - alpha * MEAN) < 0.02
        return
    n = 40_000
    chance = 4 * exact * math.sqrt(2 / n)
    coarse, fine = (moments(sampler, steps, n) for steps in (4, 100))
    assert abs(fine[1] - exact) < chance + 0.1 * exact and abs(fine[0] - alpha * MEAN) < 4 * math.sqrt(exact / n) + 0.02
    assert abs(fine[1] - exact) < abs(coarse[1] - exact) + chance


def test_neutral_it_is_ddim(method):
    denoiser, z, grid = MixtureDenoiser(PROCESS, DATA), normal(5, 1), times.uniform(7)
    assert_close(method(**method.NEUTRAL)(denoiser, z, grid), ddim(denoiser, z, grid), rtol=1e-9, atol=1e-10)


def test_what_is_drawn_does_not_depend_on_the_batch(sampler):
    denoiser, z, grid = MixtureDenoiser(PROCESS, DATA), normal(3, 1), times.uniform(5)
    together = sampler(denoiser, z, grid, generator=[rng(s) for s in (1, 2, 3)])
    for i in range(3):
        alone = sampler(denoiser, z[i : i + 1], grid, generator=[rng(i + 1)])
        assert_close(alone, together[i : i + 1], rtol=1e-12, atol=1e-12)
    assert torch.equal(sampler(denoiser, z, grid, generator=[rng(s) for s in (1, 2, 3)]), together)
    other = sampler(denoiser, z, grid, generator=[rng(s) for s in (4, 5, 6)])
    assert torch.equal(other, together) is not sampler.noisy


def test_the_callback_hears_of_every_step(sampler):
    heard = []
    denoiser, z, grid = MixtureDenoiser(PROCESS, DATA), normal(3, 1), times.uniform(5)
    callback = lambda step, t, z: heard.append((step, float(t), z))
    end = sampler(denoiser, z, grid, generator=rng(), callback=callback)
    assert [(step, t) for step, t, _ in heard] == [(i, float(t)) for i, t in enumerate(grid[1:])]
    assert torch.equal(heard[-1][2], end)


def test_half_precision_stays_half(sampler):
    end = sampler(MixtureDenoiser(PROCESS, DATA), normal(3, 1).half(), times.uniform(5), generator=rng())
    assert end.dtype == torch.float16 and end.isfinite().all()


@pytest.mark.parametrize("steps", [20, 13])
def test_as_a_scheduler_it_is_the_same(sampler, steps):
    """Also where the number of steps does not divide the table."""
    scheduler = sampler.scheduler(TABLE)
    process = GaussianProcess(DiscreteSchedule.from_alphas_cumprod(scheduler.alphas_cumprod))
    denoiser, z = MixtureDenoiser(process, DATA, "eps"), normal(4, 1)
    scheduler.set_timesteps(steps)
    grid = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1).double()])
    expected = sampler(denoiser, z, grid, generator=rng())
    assert_close(from_scheduler(scheduler)(denoiser, z, steps, generator=rng()), expected, rtol=1e-6, atol=1e-6)


def test_the_scheduler_keeps_its_settings_in_files(sampler, tmp_path):
    made = sampler.scheduler(TABLE)
    made.save_pretrained(tmp_path)
    again = type(made).from_pretrained(tmp_path)
    told = {name: json.loads(json.dumps(value)) for name, value in asdict(sampler).items()}
    assert {name: again.config[name] for name in told} == told


@pytest.fixture(scope="module")
def pixels() -> dict[str, Any]:
    """Tiny models of pixels, of frames and of blurred pixels, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        still, frames = UNet(8, 3, channels=(8, 8), layers=1, attention=()), VideoUNet(8, 3, channels=(8,), layers=1)
        for x in [*still.parameters(), *frames.parameters()]:
            torch.nn.init.normal_(x, std=0.05)
    shape = (3, 8, 8)
    return {
        "pixels": ImageModel(still.eval(), PROCESS, "v", shape),
        "blurring": ImageModel(still.eval(), BlurringProcess(Cosine(-10.0, 10.0)), "eps", shape),
        "frames": VideoModel(frames.eval(), PROCESS, "v", (3, *shape), (), {"context": 0, "sampling_steps": 2}),
    }


@pytest.mark.parametrize("kind", ["pixels", "blurring", "frames"])
def test_it_runs_on_every_kind_of_model(sampler, kind, pixels):
    model = pixels[kind]
    asked = {"scheduler": sampler, "sampling_steps": 3}
    pictures = model.draw(None, [1, 2], **asked)
    assert pictures.isfinite().all() and pictures.std() > 0
    assert torch.equal(model.draw(None, [1, 2], **asked), pictures)
    assert_close(model.draw(None, [2], **asked), pictures[1:], rtol=1e-4, atol=1e-4)


def test_it_runs_on_every_family_of_pipelines(method, family, pipe):
    """Through our draw and as the scheduler of diffusers' own call; a family without a table of betas is refused."""
    asked = {"sampling_steps": 3, "scheduler": method()}
    if pipe.prediction == "flow":
        with pytest.raises(BadInput):
            pipe.draw(["art"], [1], **asked)
        return
    before = state(pipe)
    pictures = pipe.draw(["a red star", "art"], [1, 2], **asked)
    assert torch.equal(pipe.draw(["a red star", "art"], [1, 2], **asked), pictures)
    assert_close(pipe.draw(["art"], [2], **asked), pictures[1:], rtol=1e-4, atol=1e-4)
    assert state(pipe)["scheduler"] == before["scheduler"]
    assert not torch.equal(pictures, draw(pipe, seeds=(1, 2)))
    pipe.pipe.scheduler = method().scheduler(pipe.pipe.scheduler)
    assert call(pipe, ["a star"], [1], 3).isfinite().all()


def test_misuse_is_explained(method):
    denoiser, z = MixtureDenoiser(PROCESS, DATA), normal(2, 1)
    if method().noisy:
        with pytest.raises(BadInput, match="generator"):
            method()(denoiser, z, times.uniform(3))
        with pytest.raises(BadInput, match="decrease"):
            method()(denoiser, z, times.uniform(3).flip(0), generator=rng())
    with pytest.raises(BadInput, match="no table of betas"):
        method().scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"})
