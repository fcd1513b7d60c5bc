"""Schedules against their definitions, identities and diffusers' tables. All in float64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d
from torch.testing import assert_close

from noise_cases import IDEAL, SCHEDULES
from sfumato.errors import BadInput
from sfumato.noise import (
    Bounded,
    Cosine,
    DiscreteSchedule,
    GaussianProcess,
    Interpolated,
    Karras,
    LinearBeta,
    RectifiedFlow,
    ScaledLinearBeta,
    Schedule,
    Shifted,
)

GRID = torch.linspace(0, 1, 1001, dtype=torch.float64)
INNER = GRID[1:-1]
# The times at which tables and clipped schedules have no kink.
SMOOTH = torch.linspace(0.0123456, 0.9771, 501, dtype=torch.float64)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("name", SCHEDULES)
def test_falls_and_is_float64(name):
    logsnr = SCHEDULES[name].logsnr(GRID)
    flat = "bounded" in name or name == "zero-snr-table"
    assert logsnr.dtype == torch.float64
    assert ((logsnr.diff() <= 0) | logsnr[1:].isinf() if flat else logsnr.diff() < 0).all()
    assert SCHEDULES[name].logsnr(GRID.float()).dtype == torch.float64


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_inverts_logsnr(name):
    schedule = SCHEDULES[name]
    logsnr = schedule.logsnr(INNER)
    inside = logsnr.isfinite() & (logsnr.abs() < 15) if name == "bounded-last" else logsnr.isfinite()
    assert inside.sum() > 900
    assert_close(schedule.time(logsnr[inside]), INNER[inside], rtol=0, atol=1e-13)
    flat = 1.1e-7 if "table" in name else 1e-13  # a table is flat within 1e-4 of a timestep
    assert_close(Schedule.time(schedule, logsnr[inside]), INNER[inside], rtol=0, atol=flat)  # by bisection


@pytest.mark.parametrize("name", SCHEDULES)
def test_slope_is_the_derivative(name):
    schedule = SCHEDULES[name]
    assert_close(schedule.dlogsnr_dt(SMOOTH), Schedule.dlogsnr_dt(schedule, SMOOTH), rtol=1e-10, atol=1e-10)


def test_cosine_identities():
    cosine = Cosine()
    assert_close(cosine.logsnr(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([15.0, 0, -15]).double(), **EXACT)
    assert_close(cosine.logsnr(GRID), -cosine.logsnr(1 - GRID), rtol=0, atol=1e-11)
    a, b = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    alpha, sigma = GaussianProcess(cosine).alpha_sigma(GRID)
    angle = a + GRID * (b - a)
    assert_close(alpha, angle.cos(), **EXACT)
    assert_close(sigma, angle.sin(), **EXACT)
    assert_close(IDEAL.logsnr(INNER), -2 * (math.pi * INNER / 2).tan().log(), **EXACT)


def test_shift_moves_by_resolution():
    base = Cosine()
    assert_close(Shifted(base, 64, 64).logsnr(GRID), base.logsnr(GRID), rtol=0, atol=0)
    shifted = Shifted(base, 32, 128)
    assert_close(shifted.logsnr(GRID), base.logsnr(GRID) + 2 * math.log(32 / 128), **EXACT)
    # As a warp of time for the ideal cosine.
    warped = Shifted(IDEAL, 32, 128).time(IDEAL.logsnr(INNER))
    assert_close((math.pi * INNER / 2).tan(), (math.pi * warped / 2).tan() * 128 / 32, rtol=1e-9, atol=0)
    # As a scaling of the picture by 32/128 followed by renormalising the variance.
    alpha, sigma = GaussianProcess(base).alpha_sigma(GRID)
    shifted_alpha, shifted_sigma = GaussianProcess(shifted).alpha_sigma(GRID)
    norm = ((alpha / 4) ** 2 + sigma**2).sqrt()
    assert_close(shifted_alpha, alpha / 4 / norm, **EXACT)
    assert_close(shifted_sigma, sigma / norm, **EXACT)


def test_shift_gives_the_pooled_picture_the_base_snr():
    big, small = 16, 4
    impulses = torch.eye(big * big, dtype=torch.float64).reshape(-1, 1, big, big)
    pooling = avg_pool2d(impulses, big // small).reshape(big * big, -1).T
    noise_gain = (pooling @ pooling.T).diagonal()
    assert_close(noise_gain, torch.full_like(noise_gain, (small / big) ** 2), **EXACT)
    pooled = Shifted(Cosine(), small, big).logsnr(GRID) - math.log(noise_gain[0])
    assert_close(pooled, Cosine().logsnr(GRID), **EXACT)


def test_bounds_kept_or_moved():
    ends = torch.tensor([0.0, 1.0])
    moved = 2 * math.log(1 / 4)
    assert_close(Shifted(Cosine(), 32, 128).logsnr(ends), torch.tensor([15 + moved, -15 + moved]).double())
    kept = Shifted(Cosine(), 32, 128, keep_bounds=True)
    assert_close(kept.logsnr(ends), torch.tensor([15.0, -15]).double(), rtol=0, atol=1e-10)
    with pytest.raises(BadInput, match="bounds"):
        Shifted(LinearBeta(), 32, 128, keep_bounds=True)


def test_interpolated_between_two_shifts():
    base = Cosine()
    low, high = Shifted(base, 32, 512), Shifted(base, 256, 512)
    expected = GRID * low.logsnr(GRID) + (1 - GRID) * high.logsnr(GRID)
    assert_close(Interpolated(base, 32, 256, 512).logsnr(GRID), expected, **EXACT)
    assert_close(Interpolated(base, 32, 32, 512).logsnr(GRID), low.logsnr(GRID), **EXACT)
    assert_close(Interpolated(base, 32, 512, 512).logsnr(1.0) + 15, torch.tensor(-5.545177444479562).double())
    assert (Interpolated(base, 32, 4096, 4096).logsnr(GRID).diff() < 0).all()


def test_interpolated_with_its_bounds_kept():
    kept = Interpolated(Cosine(), 32, 256, 512, keep_bounds=True)
    assert_close(kept.logsnr(torch.tensor([0.0, 1.0])), torch.tensor([15.0, -15]).double(), rtol=0, atol=1e-10)
    low, high = (Shifted(Cosine(), n, 512, keep_bounds=True).logsnr(GRID) for n in (32, 256))
    assert_close(kept.logsnr(GRID), GRID * low + (1 - GRID) * high, **EXACT)
    assert_close(Interpolated(Cosine(), 32, 32, 512, keep_bounds=True).logsnr(GRID), low, **EXACT)
    with pytest.raises(BadInput, match="bounds"):
        Interpolated(LinearBeta(), 32, 64, 128, keep_bounds=True)


def test_order_of_bounding_and_shifting_is_explicit():
    first, last = Interpolated(Cosine(), 32, 128, 128), Bounded(Interpolated(IDEAL, 32, 128, 128), -15, 15)
    assert_close(first.logsnr(1.0).item(), -15 + 2 * math.log(32 / 128), rtol=1e-12, atol=0)
    assert last.logsnr(1.0).item() == -15
    assert last.logsnr(0.0).item() == 15


@pytest.mark.parametrize("kind, schedule", [("linear", LinearBeta()), ("scaled_linear", ScaledLinearBeta())])
def test_tables_are_diffusers_tables(kind, schedule):
    scheduler = DDIMScheduler(1000, schedule.beta_start, schedule.beta_end, kind)
    table = schedule.discrete()
    assert table == DiscreteSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)
    alphas = scheduler.alphas_cumprod.double()
    for timesteps in (torch.arange(1, 1001).double() / 1000, torch.arange(1, 1001) / 1000):  # both precisions
        alpha, sigma = GaussianProcess(table).alpha_sigma(timesteps)
        assert_close(alpha**2, alphas, rtol=1e-13, atol=0)
        assert_close(sigma**2, 1 - alphas, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [LinearBeta, ScaledLinearBeta])
def test_continuous_is_the_limit_of_the_table(kind):
    """Halving the step, and beta with it, halves the distance between table and continuous schedule."""
    continuous = kind()
    gaps = []
    for steps in (1000, 2000, 4000):
        scale = 1000 / steps
        roots = [math.sqrt(scale * b) for b in (continuous.beta_start, continuous.beta_end)]
        power = 2 if kind is ScaledLinearBeta else 1
        ends = roots if power == 2 else [r**2 for r in roots]
        betas = torch.linspace(*ends, steps, dtype=torch.float64) ** power
        alphas = torch.cumprod(1 - betas, 0)
        alpha, _ = GaussianProcess(continuous).alpha_sigma(torch.arange(1, steps + 1).double() / steps)
        gaps.append((alpha**2 - alphas).abs().max().item())
    assert gaps[0] < 1e-3
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("schedule", [LinearBeta(), ScaledLinearBeta()])
def test_noise_rate(schedule):
    """-d log(alpha^2) / dt = beta(t), by differentiating the process."""
    t = INNER.clone().requires_grad_()
    log_alpha, _ = GaussianProcess(schedule).log_alpha_sigma(t)
    rate = torch.autograd.grad(-2 * log_alpha.sum(), t)[0] / 1000
    if isinstance(schedule, LinearBeta):
        expected = schedule.beta_start + INNER * (schedule.beta_end - schedule.beta_start)
    else:
        start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
        expected = (start + INNER * (end - start)) ** 2
    assert_close(rate, expected, rtol=1e-10, atol=0)


def test_table_between_and_below_timesteps():
    table = ScaledLinearBeta().discrete()
    at = table.logsnr(torch.tensor([499, 499.25, 500], dtype=torch.float64) / 1000)
    assert_close(at[1], 0.75 * at[0] + 0.25 * at[2], **EXACT)
    below, first = table.logsnr(1e-3 - 2e-7), table.logsnr(1e-3)
    assert_close(below, first, rtol=0, atol=1e-3)
    assert table.logsnr(0.0) == math.inf
    alpha, sigma = GaussianProcess(table).alpha_sigma(torch.tensor([0.0, 5e-4, 1e-3], dtype=torch.float64))
    assert (alpha[0], sigma[0]) == (1, 0)
    assert_close(alpha[1] ** 2, alpha[2], **EXACT)  # half of the first step's noise rate


def test_table_that_ends_in_pure_noise():
    table = SCHEDULES["zero-snr-table"]
    alpha, sigma = GaussianProcess(table).alpha_sigma(torch.tensor([0.999, 1.0]).double())
    assert alpha[0] > 0
    assert (alpha[1], sigma[1]) == (0, 1)


@pytest.mark.parametrize("alphas", [[0.9, 0.95, 0.1], [1.0, 0.5, 0.1], [0.9, 0.5, -0.1], [0.5], [[0.9, 0.5]]])
def test_bad_tables(alphas):
    with pytest.raises(BadInput, match="alphas_cumprod"):
        DiscreteSchedule.from_alphas_cumprod(torch.tensor(alphas))


@given(st.floats(0, 1), st.sampled_from([7.0, 3.0, -10.0]))
def test_karras_noise_levels(t, rho):
    alpha, sigma = GaussianProcess(Karras(0.01, 50.0, rho)).alpha_sigma(t)
    expected = (50 ** (1 / rho) + (1 - t) * (0.01 ** (1 / rho) - 50 ** (1 / rho))) ** rho
    assert alpha == 1
    assert_close(sigma.item(), expected, rtol=1e-12, atol=0)


@given(st.floats(0, 1, allow_subnormal=False), st.sampled_from([1.0, 3.0, 0.5]))
def test_straight_paths(t, shift):
    alpha, sigma = GaussianProcess(RectifiedFlow(shift)).alpha_sigma(t)
    expected = shift * t / (1 + (shift - 1) * t)
    assert_close(sigma.item(), expected, rtol=1e-12, atol=0)
    assert_close(alpha.item(), 1 - expected, rtol=1e-12, atol=1e-15)


def test_flow_shift_is_that_of_sd3():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigma = GaussianProcess(RectifiedFlow(3.0)).alpha_sigma(torch.arange(1000, 0, -1).double() / 1000)[1]
    assert_close(scheduler.sigmas[:1000].double(), sigma, rtol=1e-6, atol=0)
    moved = RectifiedFlow(3.0).logsnr(INNER) - RectifiedFlow().logsnr(INNER)
    assert_close(moved, torch.full_like(moved, -2 * math.log(3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Cosine(5, -5), "logsnr_min"),
        (lambda: Shifted(Cosine(), 0, 64), "noise_size"),
        (lambda: Interpolated(Cosine(), 64, 32, 64), "at most high"),
        (lambda: LinearBeta(0.02, 0.01), "beta_start"),
        (lambda: Karras(1.0, 0.5), "sigma_min < sigma_max"),
        (lambda: RectifiedFlow(0.0), "shift"),
    ],
)
def test_impossible_settings_are_refused(make, told):
    with pytest.raises(BadInput, match=told):
        make()
