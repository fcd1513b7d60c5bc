"""The mathematics of multistep consistency models, in float64 against the analytic flow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from noise_cases import PROCESSES, normal, ordered_times, processes
from sfumato.distill.parts.segments import consistency_target, draw_times, pseudo_huber, ramp, teacher_steps, v_weight
from sfumato.noise import Cosine, GaussianProcess
from sfumato.noise.addim import addim_step
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.sample import heun
from sfumato.sample.times import uniform

PROCESS = GaussianProcess(Cosine())
MEAN, VAR = torch.tensor([0.4, -1.0], dtype=torch.float64), 0.3


def flow(z, t, s):
    """Where the ODE of N(MEAN, VAR) data goes from (z, t): straight lines in standardised coordinates."""
    (a, b), (a_s, b_s) = PROCESS.alpha_sigma(t, z), PROCESS.alpha_sigma(s, z)
    scale = ((a_s**2 * VAR + b_s**2) / (a**2 * VAR + b**2)).sqrt()
    return a_s * MEAN + scale * (z - a * MEAN)


def solution(z, t, start):
    """The true multistep consistency function: the x0 whose DDIM step lands where the flow does."""
    return PROCESS.implied_x0(z, flow(z, t, start), t, start)


# Schedules


def test_teacher_steps_grow_log_linearly():
    assert teacher_steps(0.0) == pytest.approx(64) and teacher_steps(1.0) == pytest.approx(1280)
    assert teacher_steps(0.5) == pytest.approx((64 * 1280) ** 0.5)
    assert teacher_steps(ramp(250_000, 100_000)) == pytest.approx(1280)
    assert ramp(25_000, 100_000) == 0.25 and ramp(0, 0) == 1.0


@given(segments=st.integers(1, 16), substeps=st.integers(1, 400), seed=st.integers(0, 99))
def test_times_stay_in_their_segment(segments, substeps, seed):
    t, s, start = draw_times(64, segments, substeps, torch.Generator().manual_seed(seed))
    assert t.dtype == torch.float64
    total = segments * substeps
    assert_close((t - s) * total, torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (start <= s).all() and (t <= 1).all()
    assert_close(start * segments, (start * segments).round(), rtol=0, atol=1e-12)
    assert ((t - start) * segments <= 1 + 1e-12).all()
    first = ((t - start) * total).round() == 1
    assert torch.equal(s == start, first), "s equals the start exactly where it should"


def test_times_cover_everything():
    t, _, start = draw_times(20_000, 4, 5, torch.Generator().manual_seed(0))
    assert sorted({round(float(x) * 20) for x in t}) == list(range(1, 21))
    assert {float(x) for x in start} == {0.0, 0.25, 0.5, 0.75}


# The target


@given(process=processes, times=ordered_times())
def test_inverse_ddim_round_trip(process, times):
    start, t = times
    z, x0 = normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    end, _ = process.posterior(z, x0, t, start, eta=0.0)
    assert_close(process.implied_x0(z, end, t, start), x0, rtol=1e-8, atol=1e-10)


def drawn(substeps, segments=4, n=64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    t, s, start = draw_times(n, segments, substeps, rng)
    x = MEAN + VAR**0.5 * torch.randn(n, 2, dtype=torch.float64, generator=rng)
    eps = torch.randn(n, 2, dtype=torch.float64, generator=rng)
    return x, eps, t, s, start


@given(segments=st.integers(1, 8), substeps=st.integers(1, 50), seed=st.integers(0, 20))
def test_the_loss_vanishes_at_the_true_solution(segments, substeps, seed):
    """With a teacher step that follows the flow exactly, the true function is its own target."""
    x, eps, t, s, start = drawn(substeps, segments, seed=seed)
    z = PROCESS.diffuse(x, t, eps)
    z_s = flow(z, t, s)
    # Where s is the start there is no function to ask; what is given instead must not matter.
    inner = torch.where(s == start, t, s)
    guess = torch.where((s == start)[:, None], 1e3, solution(z_s, inner, start))
    target = consistency_target(PROCESS, z, z_s, guess, t, s, start)
    assert_close(target, solution(z, t, start), rtol=1e-6, atol=1e-7)
    assert pseudo_huber(target - solution(z, t, start), 1e-4).max() < 1e-6


def test_the_error_of_ddim_teacher_steps_is_of_first_order():
    """Mixture data, the flow by Heun's rule: the true function misses its target by the teacher's step, squared."""
    data = GaussianMixture.isotropic(torch.tensor([[-1.0, 0.2], [0.7, 0.5]]), 0.4)
    denoiser, z = MixtureDenoiser(PROCESS, data), normal(4, 2)
    to = lambda z, t, s: heun(denoiser, z, uniform(60, t, s))
    f = lambda z, t: PROCESS.implied_x0(z, to(z, t, 0.5), t, 0.5)
    errors = []
    for substeps in (8, 16, 32):
        t, s = 0.75, 0.75 - 0.5 / substeps
        one = lambda value: torch.full((len(z),), value, dtype=torch.float64)
        z_s = PROCESS.posterior(z, denoiser(z, t), t, s, eta=0.0)[0]
        target = consistency_target(PROCESS, z, z_s, f(z_s, s), one(t), one(s), one(0.5))
        errors.append(float((target - f(z, t)).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("name", ["cosine", "scaled-linear-table", "bounded-last", "flow", "zero-snr-table"])
def test_many_segments_recover_ddim(name):
    """One teacher step in a segment: the target is the teacher's own prediction, so the student is the teacher."""
    process = PROCESSES[name]
    x, eps, t, s, start = drawn(substeps=1, segments=8)
    z = process.diffuse(x, t, eps)
    guess = normal(*z.shape, seed=5)
    z_s, _ = process.posterior(z, guess, t, s, eta=0.0)
    target = consistency_target(process, z, z_s, normal(*z.shape, seed=6), t, s, start)
    assert_close(target, guess, rtol=1e-8, atol=1e-9)


def test_consistency_training_with_one_teacher_step_is_diffusion_training():
    """z_s = alpha_s x + sigma_s eps, and the target is the clean picture."""
    x, eps, t, s, start = drawn(substeps=1)
    z = PROCESS.diffuse(x, t, eps)
    z_s = addim_step(PROCESS, z, x, t, s, torch.zeros(len(x)))
    assert_close(z_s, PROCESS.diffuse(x, s, eps), rtol=1e-10, atol=1e-12)
    assert_close(consistency_target(PROCESS, z, z_s, normal(*x.shape), t, s, start), x, rtol=1e-8, atol=1e-9)


def test_where_s_is_the_start_the_reference_plays_no_part():
    x, eps, t, s, start = drawn(substeps=6)
    z, z_s = PROCESS.diffuse(x, t, eps), PROCESS.diffuse(x, s, eps)
    one, other = (consistency_target(PROCESS, z, z_s, normal(*x.shape, seed=i), t, s, start) for i in (1, 2))
    pinned = s == start
    assert torch.equal(one[pinned], other[pinned]) and pinned.any()
    assert not (one[~pinned] == other[~pinned]).any()
    assert torch.equal(PROCESS.posterior(z_s, one, s, start, eta=0.0)[0][pinned], z_s[pinned])


@pytest.mark.parametrize("process", [GaussianProcess(Cosine()), PROCESSES["scaled-linear-table"]])
def test_a_single_segment_is_a_consistency_model(process):
    """With data at t = 0 (to the schedule's own bound), the target is what the reference pass said."""
    x, eps, t, s, start = drawn(substeps=20, segments=1)
    inner = s > start
    z, z_s, guess = process.diffuse(x, t, eps), process.diffuse(x, s, eps), normal(*x.shape, seed=3)
    target = consistency_target(process, z, z_s, guess, t, s, start)
    # sigma_0 is 5.5e-4 for the bounded cosine, 0 for a table of betas
    assert_close(target[inner], guess[inner], rtol=0, atol=0.1 if isinstance(process.schedule, Cosine) else 1e-9)


# The distance


def test_pseudo_huber():
    d = normal(5, 3, 2, 2)
    norm = d.flatten(1).norm(dim=1)
    assert_close(pseudo_huber(d, 1e-9), norm, rtol=1e-8, atol=0)
    assert_close(2e5 * pseudo_huber(d, 1e5), norm**2, rtol=1e-4, atol=0)
    assert_close(pseudo_huber(d, 1e-9, "element"), d.abs().flatten(1).mean(1), rtol=1e-6, atol=0)
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(pseudo_huber(zero, 1e-4).sum(), zero)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_the_weight_makes_errors_of_x0_errors_of_v():
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    z, v, w = normal(5, 3), normal(5, 3, seed=1), normal(5, 3, seed=2)
    x0 = [PROCESS.convert(p, z, t, "v", "x0") for p in (v, w)]
    assert_close(v_weight(PROCESS, t) * (x0[0] - x0[1]).square().sum(1), (v - w).square().sum(1), rtol=1e-9, atol=0)
