"""diffusers' schedulers behind our signature, and our samplers against theirs.

diffusers keeps its tables in float32, so agreement is asked to a few parts in 10^5, not to float64's
precision.
"""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.testing import assert_close

from noise_cases import normal
from sfumato.errors import BadInput
from sfumato.noise import DiscreteSchedule, GaussianProcess, RectifiedFlow
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.sample import ddim, ddpm, dpmpp_2m, from_scheduler, heun
from sfumato.sample.s2n_scheduler import S2NScheduler
from sfumato.sample.schedulers import ADDIMScheduler, FewStepScheduler

DATA = GaussianMixture.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 1.0]]), 0.5)
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROCESS = GaussianProcess(DiscreteSchedule.from_alphas_cumprod(DDIMScheduler(**TABLE).alphas_cumprod))
DENOISER = MixtureDenoiser(PROCESS, DATA, "v")
Z = normal(16, 2, dtype=torch.float32)
TRAILING = torch.arange(1000, -1, -50).double() / 1000
NEAR = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim(kind):
    scheduler = DDIMScheduler(**TABLE, prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    assert_close(from_scheduler(scheduler)(DENOISER, Z, 20), ddim(DENOISER, Z, TRAILING), **NEAR)


def test_ddim_with_noise():
    scheduler = DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing")
    theirs = from_scheduler(scheduler, eta=0.7)(DENOISER, Z, 20, generator=torch.Generator().manual_seed(5))
    ours = ddim(DENOISER, Z, TRAILING, eta=0.7, generator=torch.Generator().manual_seed(5))
    assert_close(theirs, ours, **NEAR)


def test_ddpm():
    scheduler = DDPMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing")
    theirs = from_scheduler(scheduler)(DENOISER, Z, 20, generator=torch.Generator().manual_seed(5))
    ours = ddpm(DENOISER, Z, TRAILING, generator=torch.Generator().manual_seed(5))
    assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [20, TRAILING])
def test_dpm_solver(grid):
    scheduler = DPMSolverMultistepScheduler(**TABLE, timestep_spacing="trailing")
    assert_close(from_scheduler(scheduler)(DENOISER, Z, grid), dpmpp_2m(DENOISER, Z, TRAILING), **NEAR)


def test_euler_keeps_another_scale_inside():
    scheduler = EulerDiscreteScheduler(**TABLE, timestep_spacing="trailing")
    assert_close(from_scheduler(scheduler)(DENOISER, Z, 20), ddim(DENOISER, Z, TRAILING), **NEAR)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, UniPCMultistepScheduler])
def test_others_reach_the_same_end(scheduler):
    got = from_scheduler(scheduler(**TABLE, timestep_spacing="trailing"))(DENOISER, Z, 100)
    fine = heun(DENOISER, Z, torch.arange(1000, -1, -2).double() / 1000)
    assert_close(got, fine, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift):
    """Their Euler step on straight paths is DDIM; the denoiser may count its time with another shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    grid = torch.arange(20, -1, -1).double() / 20
    ours = ddim(MixtureDenoiser(GaussianProcess(RectifiedFlow(shift)), DATA, "flow"), Z, grid)
    for own in (1.0, shift, 2.0):
        denoiser = MixtureDenoiser(GaussianProcess(RectifiedFlow(own)), DATA, "flow")
        assert_close(from_scheduler(scheduler)(denoiser, Z, grid), ours, **NEAR)


def test_given_scheduler_is_left_unchanged():
    scheduler = DPMSolverMultistepScheduler(**TABLE)
    sampler = from_scheduler(scheduler)
    first = sampler(DENOISER, Z, 10)
    assert scheduler.num_inference_steps is None
    assert torch.equal(sampler(DENOISER, Z, 10), first)


def test_misuse_is_explained():
    with pytest.raises(BadInput, match="use heun"):
        from_scheduler(EDMEulerScheduler())
    with pytest.raises(BadInput, match="number of steps"):
        from_scheduler(DDIMScheduler(**TABLE))(DENOISER, Z, TRAILING)
    with pytest.raises(BadInput, match="round the grid"):
        from_scheduler(DPMSolverMultistepScheduler(**TABLE))(DENOISER, Z, torch.tensor([0.9995, 0.5, 0.0]))


@pytest.mark.parametrize("kind", [ADDIMScheduler, FewStepScheduler, S2NScheduler])
def test_ours_take_ddims_settings_by_name_and_by_place_and_their_own(kind):
    names = list(signature(DDIMScheduler).parameters)
    assert list(signature(kind).parameters)[: len(names)] == names
    assert len(kind(500, 0.001).betas) == 500 and kind(500, 0.001).betas[0] == torch.tensor(0.001)
    scheduler = kind(num_train_timesteps=500, prediction_type="v_prediction")
    assert len(scheduler.betas) == 500 and kind.from_config(scheduler.config).config == scheduler.config
    plain = DDIMScheduler.from_config(scheduler.config).config
    assert (plain.num_train_timesteps, plain.prediction_type) == (500, "v_prediction")
    with pytest.raises(TypeError, match="beta_begin"):
        kind(beta_begin=0.1)


def test_a_default_of_ddims_can_be_another():
    assert FewStepScheduler().config.timestep_spacing == "trailing"
    assert FewStepScheduler(timestep_spacing="leading").config.timestep_spacing == "leading"
    # a default that was not asked for is not carried over, as among diffusers' own schedulers
    assert FewStepScheduler.from_config(ADDIMScheduler().config).config.timestep_spacing == "trailing"
