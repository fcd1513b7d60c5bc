"""The generalised backward equation: its exact steps, its members, the sampler, and the scheduler in pipelines."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from torch.testing import assert_close

from noise_cases import PROCESSES, normal, ordered_times, processes
from sfumato import cli
from sfumato.errors import BadInput
from sfumato.noise import Cosine, DiscreteSchedule, GaussianProcess, Karras, RectifiedFlow
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.sample import S2N, ddim, ddpm, dpmpp_2m, from_scheduler, times
from sfumato.sample.s2n_rule import Rule, weights
from sfumato.sample.s2n_scheduler import S2NScheduler
from sfumato.sample.schedulers import FewStepScheduler

TIGHT = {"rtol": 1e-11, "atol": 1e-13}
MIXTURE = GaussianMixture.isotropic(
    torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.8, -1.4]]), 0.25, torch.tensor([0.5, 0.3, 0.2])
)
steps_in_log = st.floats(-6, -1e-3).map(lambda x: torch.tensor(x, dtype=torch.float64))
rhos = st.floats(0, 2)
gammas = st.floats(-1, 5)


def seeded(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# One step


@given(steps_in_log, rhos, gammas.filter(lambda g: abs(g - 1) > 1e-3))
def test_weights_are_the_card_s_a_b_and_v(log_r, rho, gamma):
    """y_s = x + (A kappa_t + B) eps + sqrt(V) xi, with kappa_t = 1.3; e and n are shares of kappa_s."""
    kappa_t = 1.3
    kappa_s = kappa_t * math.exp(log_r)
    A = (kappa_s / kappa_t) ** gamma
    B = (1 + rho**2 - gamma) / (1 - gamma) * (kappa_s - kappa_s**gamma * kappa_t ** (1 - gamma))
    V = rho**2 * kappa_s ** (2 * gamma) * (kappa_t ** (2 - 2 * gamma) - kappa_s ** (2 - 2 * gamma)) / (1 - gamma)
    e, n = weights(log_r, rho, gamma)
    scale = max(A * kappa_t, abs(B), kappa_s)  # what cancels in the sum
    assert abs(e * kappa_s - (A * kappa_t + B)) < 1e-10 * scale
    assert abs((n * kappa_s) ** 2 - V) < 1e-10 * max(V, kappa_s**2)


@given(steps_in_log, rhos)
def test_gamma_one_is_no_special_place(log_r, rho):
    r = torch.exp(log_r)
    e, n = weights(log_r, rho, 1.0)
    assert_close(e, 1 + rho**2 * log_r, **TIGHT)
    assert_close(n**2, -2 * rho**2 * log_r, **TIGHT)
    for near in (1 - 1e-9, 1 + 1e-9):
        e_near, n_near = weights(log_r, rho, near)
        assert_close(e_near, e, rtol=1e-6, atol=1e-7)
        assert_close(n_near, n, rtol=1e-6, atol=1e-7)
    assert r < 1


@given(steps_in_log, rhos, gammas)
def test_weights_solve_the_frozen_equation(log_r, rho, gamma):
    """dm/dkappa = gamma (m - x) / kappa + (1 + rho^2 - gamma) eps for the mean and dv/dkappa = 2 gamma v / kappa
    - 2 rho^2 kappa for the variance, integrated numerically from kappa = 1 (x = 0, eps = 1, so m = 1) down to r."""
    r = math.exp(log_r)
    right = lambda k, y: [gamma * y[0] / k + 1 + rho**2 - gamma, 2 * gamma * y[1] / k - 2 * rho**2 * k]
    solved = solve_ivp(right, (1.0, r), [1.0, 0.0], method="DOP853", rtol=1e-11, atol=1e-13)
    e, n = weights(log_r, rho, gamma)
    mean, variance = solved.y[:, -1]
    assert abs(e * r - mean) < 1e-8 * max(1, abs(mean))
    assert abs((n * r) ** 2 - variance) < 1e-8 * max(1, variance)


@given(steps_in_log, rhos)
def test_with_the_picture_fixed_the_noise_level_is_right_at_any_step_size(log_r, rho):
    e, n = weights(log_r, rho)
    assert_close(e**2 + n**2, torch.ones_like(e), **TIGHT)
    for one, other in zip(weights(log_r, rho, 1 + rho**2), (e, n), strict=True):
        assert_close(one, other, **TIGHT)


@given(steps_in_log, gammas)
def test_without_noise_every_freeze_is_ddim(log_r, gamma):
    e, n = weights(log_r, 0.0, gamma)
    assert (e, n) == (1, 0)


@pytest.mark.parametrize(("rho", "ratio"), [(1.0, 7.7), (0.7, 3.5)])
def test_freezing_the_noise_inflates_the_variance(rho, ratio):
    """One step over kappa 1.7 to 0.6 for data that are one point, as the card has it."""
    e, n = weights(torch.tensor(math.log(0.6 / 1.7), dtype=torch.float64), rho, 0.0)
    assert round(float(e**2 + n**2), 1) == ratio


@given(steps_in_log, st.floats(-0.5, 0.9))
def test_the_weighted_step_is_exact_where_the_noise_is_a_power_of_kappa(log_r, g):
    """If eps = c kappa^-g along the path, y_s - y_t is its integral."""
    kappa_t, c = 1.7, 0.8
    kappa_s = kappa_t * math.exp(log_r)
    e, n = weights(log_r, 0.0, None, g)
    # x0 = y_t - kappa_t eps_t, so y_s - y_t = (e kappa_s - kappa_t) eps_t
    moved = (e * kappa_s - kappa_t) * c * kappa_t**-g
    assert n == 0
    assert abs(moved - quad(lambda k: c * k**-g, kappa_t, kappa_s, epsabs=1e-13)[0]) < 1e-9


def test_the_weighted_step_is_longer_or_shorter_by_half_g_h():
    """1 + g h / 2 to first order, h = log(kappa_t / kappa_s)."""
    h, g = 1e-3, 0.05
    e, _ = weights(torch.tensor(-h, dtype=torch.float64), 0.0, None, g)
    length = (math.exp(h) - e) / (math.exp(h) - 1)  # of the step in y, relative to DDIM's
    assert abs(length - (1 + g * h / 2)) < g * h**2


@pytest.mark.parametrize("gamma", [None, 0.0, 1.0, 3.0])
def test_the_ends_of_the_noise(gamma):
    end = torch.tensor(-math.inf, dtype=torch.float64)
    assert weights(end, 0.7, gamma) == (0, 1)
    assert weights(end, 0.0, gamma, 0.1) == (1, 0)


# Members, for every schedule


@given(processes, ordered_times(), st.sampled_from([(0.0, 0.0), (1.0, 1.0)]))
def test_rho_zero_and_one_are_ddim_and_ddpm(process, pair, member):
    rho, eta = member
    s, t = pair
    a, b, std = S2N(rho=rho).coefficients(process, t, s)
    expected = process.coefficients(t, s, eta=eta)
    for got, exact in zip((a, b, std**2), expected, strict=True):
        assert_close(got, exact, **TIGHT)


@given(processes, ordered_times(), st.floats(0, 1), rhos)
def test_delta_rho_and_eta_are_three_names_of_one_family(process, pair, eta, rho):
    s, t = pair
    r = torch.exp((process.logsnr(t) - process.logsnr(s)) / 2)
    a, b, std = S2N(delta=(eta * (1 - r**2).sqrt()).item()).coefficients(process, t, s)
    for got, exact in zip((a, b, std**2), process.coefficients(t, s, eta=eta), strict=True):
        assert_close(got, exact, rtol=1e-7, atol=1e-9)
    share = (1 - r ** (2 * rho**2)).sqrt().item()
    ours = S2N(rho=rho).coefficients(process, t, s)
    for got, exact in zip(S2N(delta=share).coefficients(process, t, s), ours, strict=True):
        assert_close(got, exact, rtol=1e-6, atol=1e-7)  # 1 - share^2 cancels


@given(processes, ordered_times(), rhos, st.none() | st.floats(0, 1))
def test_marginals_stay_exact_when_the_picture_is_known(process, pair, rho, delta):
    s, t = pair
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    a, b, std = S2N(rho=rho, delta=delta).coefficients(process, t, s)
    assert_close(a * alpha_t + b, alpha_s, **TIGHT)
    assert_close(a**2 * sigma_t**2 + std**2, sigma_s**2, **TIGHT)


@pytest.mark.parametrize("rule", [S2N(rho=0), S2N(rho=0.7), S2N(rho=1, freeze=0), S2N(delta=0.5), S2N(gamma_w=0.1)])
def test_pure_noise_clean_pictures_and_steps_that_stand_still(rule):
    process = GaussianProcess(RectifiedFlow())
    t, s = torch.tensor([1.0, 1.0, 0.5, 0.5]), torch.tensor([0.5, 0.0, 0.0, 0.5])
    a, b, std = rule.coefficients(process, t, s)
    assert all(torch.isfinite(x).all() for x in (a, b, std))
    assert torch.equal(torch.stack([a, b, std])[:, 1:3], torch.tensor([[0.0, 0], [1, 1], [0, 0]]).double())
    assert (a[3], b[3], std[3]) == (1, 0, 0)
    assert b[0] == 0.5 and torch.isclose(a[0] ** 2 + std[0] ** 2, torch.tensor(0.25).double())


@pytest.mark.parametrize("rule", [S2N(rho=0), S2N(rho=0, freeze=0.3), S2N(rho=0, gamma_w=0.1), S2N(delta=0)])
@pytest.mark.parametrize("name", ["flow", "zero-snr-table"])
def test_without_fresh_noise_the_step_to_pure_noise_is_ddims(rule, name):
    t, s = torch.tensor([0.01, 0.5]), torch.tensor([1.0, 1.0])
    expected = PROCESSES[name].coefficients(t, s, eta=0.0)
    for got, exact in zip(rule.coefficients(PROCESSES[name], t, s), expected, strict=True):
        assert torch.isfinite(exact).all()
        assert_close(got, exact, **TIGHT)


# The sampler


@pytest.mark.parametrize("sampler", [ddim, S2N(rho=0), S2N(rho=0, order=2), dpmpp_2m])
def test_a_flow_runs_backwards_to_pure_noise(sampler):
    process = PROCESSES["flow"]
    denoiser, z = MixtureDenoiser(process, MIXTURE, "flow"), normal(5, 2)
    grid = torch.linspace(0.01, 1, 60).double()
    back = sampler(denoiser, z, grid)
    nearly = torch.cat([grid[:-1], torch.tensor([1 - 1e-9]).double()])
    assert_close(back, sampler(denoiser, z, nearly), rtol=0, atol=1e-6)
    with pytest.raises(BadInput, match="begin a little above time 0"):
        sampler(denoiser, z, torch.tensor([0.0, 0.9]))
    each = torch.tensor([[0.0, 0.3, 0.3, 0.3, 0.3], [0.0, 0.5, 0.5, 0.5, 1.0]]).double()
    moved = sampler(denoiser, z, each)
    assert torch.equal(moved[0], z[0]) and torch.isfinite(moved).all()  # one at rest may be clean


@pytest.mark.parametrize("name", ["cosine", "karras", "flow", "zero-snr-table"])
def test_members_as_samplers(name):
    process, grid = PROCESSES[name], times.uniform(7)
    denoiser, z = MixtureDenoiser(process, MIXTURE, "v"), normal(5, 2)
    assert_close(S2N(rho=0)(denoiser, z, grid), ddim(denoiser, z, grid), rtol=1e-9, atol=1e-10)
    assert_close(S2N(rho=0, freeze=-3)(denoiser, z, grid), ddim(denoiser, z, grid), rtol=1e-9, atol=1e-10)
    assert_close(S2N(rho=0, order=2)(denoiser, z, grid), dpmpp_2m(denoiser, z, grid), rtol=1e-9, atol=1e-10)
    for final in (True, False):
        ours = S2N(rho=1)(denoiser, z, grid, generator=seeded(), final_noise=final)
        theirs = ddpm(denoiser, z, grid, generator=seeded(), final_noise=final)
        assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_fresh_noise_only_is_the_sampler_of_inverse_heat_dissipation():
    process, z = PROCESSES["cosine"], normal(3, 2)
    denoiser = MixtureDenoiser(process, MIXTURE)
    got = S2N(delta=1)(denoiser, z, torch.tensor([0.6, 0.4]), generator=seeded())
    alpha, sigma = process.alpha_sigma(torch.tensor(0.4))
    assert_close(got, alpha * denoiser(z, torch.tensor(0.6)) + sigma * normal(3, 2, seed=4), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", [S2N(rho=0.7), S2N(rho=0.4, freeze=0.3, order=2), S2N(rho=0, gamma_w=0.05)])
def test_all_schedules_are_one_process_in_kappa(rule):
    """The same levels of kappa and the same noise give the same z / alpha, variance preserving or exploding."""
    levels = torch.linspace(-4, 6, 12, dtype=torch.float64)
    ends = []
    for schedule in (Cosine(), Karras(), RectifiedFlow()):
        process = GaussianProcess(schedule)
        grid = schedule.time(levels)
        (start, _), (end, _) = process.alpha_sigma(grid[0]), process.alpha_sigma(grid[-1])
        z = start * math.exp(2) * normal(4, 2)
        ends.append(rule(MixtureDenoiser(process, MIXTURE, "eps"), z, grid, generator=seeded()) / end)
    assert_close(ends[0], ends[1], rtol=1e-7, atol=1e-8)
    assert_close(ends[0], ends[2], rtol=1e-7, atol=1e-8)


def final_variance(rule: S2N, steps: int, c2: float = 0.3, bias: float = 0.0) -> float:
    """Of samples for data N(0, c2), whose steps are linear; ``bias`` is a relative error of the predicted noise."""
    process = PROCESSES["cosine"]
    grid = times.logsnr(process.schedule, steps)
    alpha, sigma = process.alpha_sigma(grid[:-1])
    gain = (1 + bias) * sigma / (alpha**2 * c2 + sigma**2)  # eps_hat = gain z
    a, b, std = rule.coefficients(process, grid[:-1], grid[1:])
    variance = 1.0
    for factor, added in zip((a + b * (1 - sigma * gain) / alpha).tolist(), std.tolist(), strict=True):
        variance = factor**2 * variance + added**2
    return variance


@pytest.mark.parametrize("rule", [S2N(rho=r, freeze=f) for r in (0, 0.5, 1, 1.5) for f in (None, 0.5, 0)], ids=str)
def test_every_member_converges(rule):
    """The error of the variance falls as 1 / steps, with one constant for all."""
    for n in (200, 400, 800, 1600, 3200):
        assert abs(final_variance(rule, n) - 0.3) < 8 / n


def test_few_steps_want_no_noise_and_a_wrong_score_wants_some():
    """The two halves of the trade-off, without chance: Gaussian data, a right score, then one that is 5 % off."""
    error = lambda rho, steps, bias: abs(final_variance(S2N(rho=rho), steps, bias=bias) - 0.3)
    assert error(0, 10, 0.0) < error(0.5, 10, 0.0) < error(1, 10, 0.0)
    assert error(1, 200, 0.05) < error(0.5, 200, 0.05) < error(0, 200, 0.05)


def test_misuse_is_explained():
    denoiser, z = MixtureDenoiser(PROCESSES["cosine"], MIXTURE), normal(2, 2)
    for settings, told in [
        ({"rho": -1}, "rho"), ({"delta": 1.2}, "at most 1"), ({"order": 3}, "order"), ({"freeze": math.nan}, "finite"),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=told):
            S2N(**settings)
    with pytest.raises(BadInput, match="decrease"):
        S2N()(denoiser, z, times.uniform(3).flip(0), generator=seeded())
    with pytest.raises(BadInput, match="generator"):
        S2N()(denoiser, z, times.uniform(3))
    backwards = times.uniform(9, 0.0, 0.9)  # without noise they may increase
    assert_close(S2N(rho=0)(denoiser, z, backwards), ddim(denoiser, z, backwards), rtol=1e-9, atol=1e-10)


# The scheduler

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("settings", [{"timestep_spacing": "trailing"}, {"set_alpha_to_one": False, "steps_offset": 1}])
def test_it_takes_ddim_s_steps(kind, settings):
    theirs = DDIMScheduler(**TABLE, clip_sample=False, prediction_type=kind, **settings)
    ode, sde = S2N(rho=0).scheduler(theirs), S2N(rho=1).scheduler(theirs)
    for scheduler in (theirs, ode, sde):
        scheduler.set_timesteps(20)
    for i, t in enumerate(theirs.timesteps):
        z, out = normal(2, 4, seed=i), normal(2, 4, seed=99 + i)
        near = {"rtol": 1e-5, "atol": 1e-5}  # their tables are float32
        assert_close(ode.step(out, t, z).prev_sample, theirs.step(out, t, z).prev_sample, **near)
        expected = theirs.step(out, t, z, eta=1.0, generator=seeded())
        got = sde.step(out, t, z, generator=seeded())
        assert_close(got.prev_sample, expected.prev_sample, **near)
        assert_close(got.pred_original_sample, expected.pred_original_sample, **near)


def test_rho_one_on_the_full_table_is_ddpm_with_the_small_variance():
    theirs = DDPMScheduler(**TABLE, variance_type="fixed_small", clip_sample=False)
    ours = S2N(rho=1).scheduler(theirs)
    ours.set_timesteps(1000)
    for t in (999, 500, 10, 1, 0):
        z, out = normal(2, 4, seed=t), normal(2, 4, seed=t + 1)
        expected = theirs.step(out, t, z, generator=seeded()).prev_sample
        assert_close(ours.step(out, t, z, generator=seeded()).prev_sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [S2N(rho=0.6), S2N(rho=0.6, order=2), S2N(delta=0.3), S2N(rho=0.5, freeze=0.2)])
@pytest.mark.parametrize("steps", [20, 13])
def test_the_scheduler_and_the_sampler_are_one(rule, steps):
    """Also where the number of steps does not divide the table."""
    scheduler = rule.scheduler({**TABLE, "timestep_spacing": "trailing"})
    process = GaussianProcess(DiscreteSchedule.from_alphas_cumprod(scheduler.alphas_cumprod))
    denoiser, z = MixtureDenoiser(process, MIXTURE, "eps"), normal(6, 2)
    scheduler.set_timesteps(steps)
    grid = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1).double()])
    ours = rule(denoiser, z, grid, generator=seeded())
    assert_close(from_scheduler(scheduler)(denoiser, z, steps, generator=seeded()), ours, rtol=1e-6, atol=1e-6)


def test_second_order_without_noise_is_dpm_solver():
    theirs = DPMSolverMultistepScheduler(**TABLE, timestep_spacing="trailing")
    ours = S2N(rho=0, order=2).scheduler(theirs)
    process = GaussianProcess(DiscreteSchedule.from_alphas_cumprod(ours.alphas_cumprod))
    denoiser, z = MixtureDenoiser(process, MIXTURE, "eps"), normal(6, 2, dtype=torch.float32)
    a, b = (from_scheduler(x)(denoiser, z, 20, generator=seeded()) for x in (ours, theirs))
    assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("grid", ["logsnr", "karras"])
@pytest.mark.parametrize("zero", [False, True])
def test_grids_between_the_trained_timesteps(grid, zero):
    table = {**TABLE, "rescale_betas_zero_snr": zero, "prediction_type": "v_prediction"}
    scheduler = S2N(rho=0.5).scheduler(table, grid)
    scheduler.set_timesteps(9)
    steps = scheduler.timesteps
    assert len(steps) == 9 and (steps.diff() < 0).all()
    assert (steps[0], steps[-1]) == (998 if zero else 999, 0)
    root = -scheduler.process.logsnr((steps.double() + 1) / 1000)
    root = root if grid == "logsnr" else torch.exp(root / 14)
    assert_close(root.diff(), root.diff().mean().expand(8), rtol=2e-3, atol=0)
    denoiser = MixtureDenoiser(scheduler.process, MIXTURE, "v")
    out = from_scheduler(scheduler)(denoiser, normal(4, 2), 9, generator=seeded())
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("asked", [{"grid": "logsnr"}, {"grid": "karras"}, {"timesteps": [700, 300, 0]}], ids=str)
def test_own_grids_end_at_the_clean_sample_also_under_stable_diffusions_settings(asked, order):
    table, given = {**TABLE, "set_alpha_to_one": False}, asked.get("timesteps")
    scheduler = S2N(rho=0.5, order=order).scheduler(table, asked.get("grid", "spacing"))
    scheduler.set_timesteps(None if given else 5, timesteps=given)
    denoiser = MixtureDenoiser(scheduler.process, MIXTURE, "eps")
    z = normal(4, 2)
    for timestep in scheduler.timesteps:
        t = (float(timestep) + 1) / 1000
        step = scheduler.step(denoiser(z, t), timestep, z, generator=seeded())
        z = step.prev_sample
    assert_close(z, step.pred_original_sample)


@pytest.mark.parametrize("make", [lambda: S2N(rho=0.5).scheduler(TABLE), lambda: FewStepScheduler(**TABLE)])
def test_pictures_are_noised_between_the_trained_timesteps_too(make):
    scheduler, x, noise = make(), normal(3, 2), normal(3, 2, seed=1)
    whole = torch.tensor([0, 400, 999])
    theirs = DDIMScheduler(**TABLE).add_noise(x, noise, whole)
    assert_close(scheduler.add_noise(x, noise, whole), theirs, rtol=1e-6, atol=1e-6)
    between = scheduler.add_noise(x, noise, torch.tensor([400.5]))
    alpha, sigma = scheduler.process.alpha_sigma(401.5 / 1000)
    assert_close(between, alpha * x + sigma * noise)


def test_zero_snr_starts_from_the_prediction_alone():
    scheduler = S2N(rho=0.5).scheduler({**TABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    scheduler.set_timesteps(timesteps=[999, 500])
    z, v, noise = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    alpha, sigma = scheduler.process.alpha_sigma(501 / 1000)
    assert_close(scheduler.step(v, 999, z, variance_noise=noise).prev_sample, -alpha * v + sigma * noise)


def test_it_saves_and_loads_and_leaves_half_precision_half(tmp_path):
    scheduler = S2N(rho=0.7, freeze=0.3, order=2).scheduler(DDIMScheduler(**TABLE), grid="karras")
    scheduler.save_pretrained(tmp_path)
    loaded = S2NScheduler.from_pretrained(tmp_path)
    assert loaded.rule == Rule(rho=0.7, freeze=0.3, order=2) and loaded.config.grid == "karras"
    assert loaded.config.clip_sample == DDIMScheduler().config.clip_sample
    assert not S2N().scheduler().config.clip_sample
    loaded.set_timesteps(5)
    out = loaded.step(normal(1, 4).half(), loaded.timesteps[0], normal(1, 4).half(), generator=seeded())
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == torch.float16


def test_clipping_bounds_the_picture():
    scheduler = S2N(rho=0).scheduler({**TABLE, "clip_sample": True})
    scheduler.set_timesteps(5)
    out = scheduler.step(normal(2, 9), scheduler.timesteps[0], normal(2, 9, seed=1))
    assert out.pred_original_sample.abs().max() == 1


def test_scheduler_misuse_is_explained():
    with pytest.raises(BadInput, match="no table of betas"):
        S2N().scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(BadInput, match="unknown grid"):
        S2N().scheduler(grid="log")
    for wrong in ([3, 5], [1000, 5], [5, -1], []):
        with pytest.raises(BadInput, match="timesteps must decrease"):
            S2N().scheduler().set_timesteps(timesteps=wrong)
    with pytest.raises(BadInput, match="two steps"):
        S2N().scheduler(grid="logsnr").set_timesteps(1)


# In pipelines


def test_in_a_pipeline(tiny_sd):
    draw = lambda scheduler, seeds=(1, 2): tiny_sd.draw("a red star", seeds, sampling_steps=4, scheduler=scheduler)
    assert_close(draw(S2N(rho=0)), draw("ddim"), rtol=1e-4, atol=1e-4)
    noisy = draw("s2n")
    assert torch.equal(noisy, draw(S2N(rho=0.5))) and not torch.equal(noisy, draw("ddim"))
    assert_close(draw("s2n", [2]), noisy[1:], rtol=1e-4, atol=1e-4)  # no picture depends on its batch
    with pytest.raises(BadInput, match="s2n"):
        draw("euler")


def test_in_diffusers_own_pipeline(tiny_sd):
    pipe = tiny_sd.copy().pipe
    pipe.scheduler = S2N(rho=0.5).scheduler(pipe.scheduler, grid="karras")
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a star", num_inference_steps=3, generator=seeded(), output_type="pt").images
    assert out.shape == (1, 3, 16, 16) and torch.isfinite(out).all()
    asked = {"strength": 0.7, "num_inference_steps": 4, "generator": seeded(), "output_type": "pt"}
    again = StableDiffusionImg2ImgPipeline.from_pipe(pipe)("a star", out, **asked).images
    assert again.shape == out.shape and torch.isfinite(again).all()


def test_on_the_command_line(tiny_sd, tmp_path, capsys):
    tiny_sd.save(tmp_path / "model")
    base = ["sample", "a red star", "--model", str(tmp_path / "model"), "--steps", "2", "--out"]
    assert cli.main([*base, str(tmp_path / "a"), "--scheduler", "s2n", "--rho", "0.7", "--order", "2"]) == 0
    record = json.loads((tmp_path / "a" / "sample.json").read_text())
    assert (record["scheduler"], record["scheduler-rho"], record["scheduler-order"]) == ("s2n", 0.7, 2)
    capsys.readouterr()
    assert cli.main([*base, str(tmp_path / "b"), "--rho", "0.7"]) == 2  # an option of s2n only
    assert cli.main([*base, str(tmp_path / "b"), "--scheduler=s2n", "--rho", "-1"]) == 2
    assert "rho must be at least 0" in capsys.readouterr().err


def test_a_pipeline_saved_with_the_scheduler_loads_in_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline

    import sfumato as sf

    pipe = sf.load("sketch", "cpu").pipe
    pipe.scheduler = S2NScheduler.from_config(pipe.scheduler.config, rho=0.3)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe").scheduler
    assert type(loaded) is S2NScheduler
    assert loaded.config.rho == 0.3
