from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from sfumato.errors import BadInput
from sfumato.pipeline.clock import FlowClock, TableClock, dynamic_shift
from sfumato.sample.scheduler import from_scheduler
from sfumato.sample.schedulers import RectifiedFlowScheduler


def table() -> TableClock:
    return TableClock.of(DDIMScheduler())


def flow(**settings) -> FlowClock:
    return FlowClock.of(FlowMatchEulerDiscreteScheduler(shift=3.0), **settings)


def test_a_table_tells_the_timestep_and_snaps_float32_times_to_it():
    clock = table()
    timesteps = torch.arange(1000)
    times = (timesteps + 1).float() / 1000
    assert torch.equal(clock.number(times), timesteps.float())
    torch.testing.assert_close(clock.time_of(timesteps), (timesteps + 1).double() / 1000)
    assert [clock.time(t) for t in (0, 499, 999)] == [0.001, 0.5, 1.0]
    assert clock.number(0.0) == 0 and clock.number(0.5005) == pytest.approx(499.5)
    abar = DDIMScheduler().alphas_cumprod[499].double()
    assert clock.process.alpha_sigma(0.5)[0] ** 2 == pytest.approx(abar)


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({}, lambda sigma: 1000 * sigma),  # SD3
        ({"scale": 1.0}, lambda sigma: sigma),  # Flux
        ({"scale": 1.0, "backward": True, "negated": True}, lambda sigma: (1000 - 1000 * sigma) / 1000),  # Z-Image
    ],
)
def test_a_flow_tells_its_sigma_in_the_familys_own_number(settings, number):
    clock = flow(**settings)
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(clock.number(t), number(t).float())
    torch.testing.assert_close(clock.time_of(clock.number(t)), t, atol=1e-6, rtol=1e-6)
    alpha, sigma = clock.process.alpha_sigma(t)
    torch.testing.assert_close((alpha, sigma), (1 - t, t))
    assert clock.native(torch.ones(())) == (-1 if clock.negated else 1)


def test_a_flow_schedulers_timesteps_are_what_the_network_is_told_bit_for_bit():
    solver = FlowMatchEulerDiscreteScheduler(shift=3.0)
    clock, whole = flow(scale=1.0), flow()
    clock.begin(solver, 7, (16, 8, 8))
    for timestep, sigma in zip(solver.timesteps, solver.sigmas, strict=False):
        assert clock.time(timestep) == pytest.approx(float(sigma), abs=1e-6)
        assert torch.equal(clock.number(clock.time(timestep)), timestep / 1000)
        assert torch.equal(whole.number(whole.time(timestep)), timestep)


def test_the_dynamic_shift_goes_by_the_number_of_tokens():
    solver = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert dynamic_shift(1234, solver.config) == calculate_shift(1234)
    flow(even=True).begin(solver, 4, (16, 64, 32))
    mu = calculate_shift(32 * 16)
    even = np.linspace(1, 1 / 4, 4)
    torch.testing.assert_close(
        solver.sigmas[:-1], torch.tensor(math.exp(mu) / (math.exp(mu) + (1 / even - 1))).float()
    )


def test_the_flows_ddim_is_the_deterministic_step_of_its_process():
    clock, rng = flow(), torch.Generator().manual_seed(0)
    z, pred = torch.randn(2, 1, 3, 4, 4, generator=rng).double()
    solver = clock.solvers["ddim"](FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    clock.begin(solver, 5, z.shape)
    t, s = (clock.time(x) for x in solver.timesteps[:2])
    x0, eps = clock.process.split(pred, z, t, "flow")
    step = solver.step(pred, solver.timesteps[0], z.float(), return_dict=False)[0]
    torch.testing.assert_close(step.double(), clock.process.diffuse(x0, s, eps), atol=1e-5, rtol=1e-5)


def test_named_solvers_keep_the_pipelines_shift():
    sana = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    for config in (sana.config, FlowMatchEulerDiscreteScheduler(shift=3.0).config):
        assert FlowClock.solvers["ddim"](config).config.shift == 3.0
        assert FlowClock.solvers["dpm++"](config).config.flow_shift == 3.0
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.3, max_shift=0.9)
    for kind in ("ddim", "dpm++"):
        solver = FlowClock.solvers[kind](dynamic.config)
        assert dynamic_shift(1234, solver.config) == dynamic_shift(1234, dynamic.config)
        flow().begin(solver, 4, (16, 64, 32))
        assert solver.timesteps[0] == pytest.approx(1000, abs=1.0)


def test_a_reflowed_models_ddim_has_the_times_that_it_was_made_for():
    own = RectifiedFlowScheduler()
    solver = FlowClock.solvers["ddim"](own.config)
    clock = FlowClock.of(own)
    clock.begin(solver, 4, (1, 4, 8, 8))
    assert [clock.time(t) for t in solver.timesteps] == [1.0, 0.75, 0.5, 0.25]
    z, pred = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    x0, eps = clock.process.split(pred, z, 0.5, "flow")
    step = solver.step(pred, solver.timesteps[2], z, return_dict=False)[0]
    torch.testing.assert_close(step, clock.process.diffuse(x0, 0.25, eps))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_table_begins_at_a_timestep_that_it_has(spacing):
    scheduler = DDIMScheduler(num_train_timesteps=10, timestep_spacing=spacing, steps_offset=1)
    clock, shape = TableClock.of(scheduler), (1, 4, 8, 8)
    clock.begin(scheduler, 9, shape)
    if spacing == "leading":
        with pytest.raises(BadInput, match="steps of this pipeline's DDIMScheduler begin at timestep 10, and"):
            clock.begin(scheduler, 10, shape)
    else:
        clock.begin(scheduler, 10, shape)


def test_a_scheduler_of_the_other_kind_is_refused():
    euler, heun = FlowMatchEulerDiscreteScheduler(), EulerDiscreteScheduler()
    with pytest.raises(BadInput, match="use ddim, dpm"):
        flow().check(heun)
    with pytest.raises(BadInput, match="a table of alphas"):
        table().check(euler)
    flow().check(euler)
    table().check(heun)
    with pytest.raises(BadInput, match="flow matching"):
        FlowClock.of(heun)
    with pytest.raises(BadInput, match="no noise schedule"):
        TableClock.of(euler)
    with pytest.raises(BadInput, match="unsupported prediction type"):
        TableClock.of(DPMSolverMultistepScheduler(prediction_type="flow_prediction"))


def test_a_scheduler_whose_timesteps_are_log_sigma_is_refused():
    told = {"prediction_type": "v_prediction", "timestep_type": "continuous"}
    continuous = EulerDiscreteScheduler(**told)
    continuous.set_timesteps(4)
    assert continuous.timesteps[0] == pytest.approx(0.25 * math.log(continuous.sigmas[0]))
    with pytest.raises(BadInput, match=r"tells the network 0\.25 log sigma"):
        TableClock.of(continuous)
    for solver in (continuous, EDMEulerScheduler()):
        with pytest.raises(BadInput, match=f"{type(solver).__name__} tells it numbers of its own: use ddim"):
            table().check(solver)
    with pytest.raises(BadInput, match="use heun"):
        from_scheduler(continuous)
    noise = EulerDiscreteScheduler(timestep_type="continuous")  # which tells it timesteps
    TableClock.of(noise).check(noise)


def test_a_scheduler_that_takes_no_times_of_a_model_is_refused_by_name():
    config, shape = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config, (1, 4, 8, 8)
    heun, solver = FlowMatchHeunDiscreteScheduler(), SASolverScheduler
    with pytest.raises(BadInput, match=r"FlowMatchHeunDiscreteScheduler .* takes no sigmas\): use ddim or dpm"):
        flow(even=True).begin(heun, 4, shape)
    flow().begin(heun, 4, shape)  # SD3's
    dynamic = solver.from_config(config, use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(BadInput, match=r"SASolverScheduler .* takes no mu\)"):
        flow().begin(dynamic, 4, shape)


@pytest.mark.parametrize("steps", [1, 3])
def test_runge_kutta_steps_that_are_too_few_are_refused(steps):
    scheduler, shape = PNDMScheduler(), (1, 4, 8, 8)
    with pytest.raises(BadInput, match=f"PNDMScheduler cannot make {steps} steps?: ask for more"):
        TableClock.of(scheduler).begin(scheduler, steps, shape)
    TableClock.of(scheduler).begin(scheduler, 4, shape)
    short = PNDMScheduler(skip_prk_steps=True)
    TableClock.of(short).begin(short, steps, shape)


def test_a_run_that_counts_from_the_picture_is_told_in_the_clocks_own_timesteps():
    clock, noisy = flow(), FlowMatchEulerDiscreteScheduler()
    noisy.set_timesteps(4)
    assert clock.run(noisy) == noisy.timesteps.tolist()
    backward = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, invert_sigmas=True)
    backward.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert backward.timesteps.tolist() == [0.0, 0.25, 0.5, 0.75]
    assert clock.run(backward) == [1000.0, 750.0, 500.0, 250.0]
