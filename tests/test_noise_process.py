"""The Gaussian process against independent derivations of its conversions and posteriors, in float64."""

from __future__ import annotations

import math
from itertools import product
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from torch.testing import assert_close

from noise_cases import PROCESSES, Blur, inner_times, normal, ordered_times, processes
from sfumato.errors import BadInput
from sfumato.noise import Cosine, DiscreteSchedule, GaussianProcess, Karras, Prediction, RectifiedFlow
from sfumato.noise.process import pad_right

KINDS = get_args(Prediction)
X0, EPS = normal(5, 2, 4, 3, seed=1), normal(5, 2, 4, 3, seed=2)


def truth(process: GaussianProcess, t: float, kind: str) -> torch.Tensor:
    """Each prediction by its definition, from the x0 and eps that made z."""
    alpha, sigma = process.alpha_sigma(t)
    return {
        "x0": X0,
        "eps": EPS,
        "v": alpha * EPS - sigma * X0,
        "flow": EPS - X0,
        # The gradient of log N(z; alpha x0, sigma^2).
        "score": (alpha * X0 - (alpha * X0 + sigma * EPS)) / sigma**2,
    }[kind]


@given(processes, inner_times)
def test_every_conversion_gives_the_definition(process, t):
    z = process.diffuse(X0, t, EPS)
    alpha, sigma = (x.item() for x in process.alpha_sigma(t))
    # Dividing by alpha or sigma magnifies rounding by the scale of z over that number (twice for the score).
    tolerance = 1e-13 * (1 + alpha + sigma) * (1 + (1 + sigma) / alpha) * (1 + (1 + alpha) / sigma) ** 2
    for source, target in product(KINDS, KINDS):
        converted = process.convert(truth(process, t, source), z, t, source, target)
        assert_close(converted, truth(process, t, target), rtol=tolerance, atol=tolerance)


@given(processes, inner_times, st.sampled_from(KINDS), st.sampled_from(KINDS))
def test_conversions_round_trip(process, t, source, target):
    z, pred = normal(3, 4, seed=3), normal(3, 4, seed=4)
    back = process.convert(process.convert(pred, z, t, source, target), z, t, target, source)
    alpha, sigma = (x.item() for x in process.alpha_sigma(t))
    scale = max(1, 1 / alpha, 1 / sigma, sigma / alpha, alpha / sigma, sigma, 1 / sigma**2) ** 2
    assert_close(back, pred, rtol=1e-13 * scale, atol=1e-13 * scale)
    assert process.convert(pred, z, t, source, source) is pred


@given(processes, inner_times, st.sampled_from(KINDS))
def test_split_recomposes(process, t, kind):
    z, pred = normal(3, 4, seed=3), normal(3, 4, seed=4)
    x0, eps = process.split(pred, z, t, kind)
    assert_close(process.diffuse(x0, t, eps), z, rtol=1e-10, atol=1e-10)
    assert_close(x0, process.convert(pred, z, t, kind, "x0"), rtol=0, atol=0)


@given(processes, ordered_times())
def test_posterior_is_bayes(process, times):
    """Conditioning the joint Gaussian of (z_s, z_t) given x0; and again as a product of precisions."""
    s, t = times
    (alpha_s, sigma_s), (alpha_t, sigma_t) = process.alpha_sigma(s), process.alpha_sigma(t)
    z = process.diffuse(X0, t, EPS)
    x0 = normal(*z.shape, seed=5)
    mean, var = process.posterior(z, x0, t, s)

    scale = alpha_t / alpha_s
    covariance = scale * sigma_s**2
    gain = covariance / sigma_t**2
    assert_close(mean, alpha_s * x0 + gain * (z - alpha_t * x0), rtol=1e-9, atol=1e-9)
    assert_close(var, sigma_s**2 - gain * covariance, rtol=1e-9, atol=1e-13)

    step = sigma_t**2 - scale**2 * sigma_s**2
    precise = 1 / (1 / sigma_s**2 + scale**2 / step)
    assert_close(var, precise, rtol=1e-7, atol=1e-13)
    assert_close(mean, precise * (scale / step * z + alpha_s / sigma_s**2 * x0), rtol=1e-7, atol=1e-7)


@given(processes, ordered_times(), st.floats(0, 1))
def test_step_keeps_the_marginal(process, times, eta):
    """Averaged over q(z_t | x0), every member of the family gives q(z_s | x0)."""
    s, t = times
    (alpha_s, sigma_s), (alpha_t, sigma_t) = process.alpha_sigma(s), process.alpha_sigma(t)
    a, b, var = process.coefficients(t, s, eta=eta)
    assert_close(a * alpha_t + b, alpha_s, rtol=1e-12, atol=1e-14)
    assert_close(a**2 * sigma_t**2 + var, sigma_s**2, rtol=1e-12, atol=0)
    assert_close(var, eta**2 * process.coefficients(t, s)[2], rtol=1e-12, atol=1e-300)
    if eta == 0:
        assert_close(a, sigma_s / sigma_t, rtol=1e-12, atol=0)


@given(processes, ordered_times(3))
def test_transitions_compose(process, times):
    s, u, t = times
    (alpha_us, var_us), (alpha_tu, var_tu) = process.transition(s, u), process.transition(u, t)
    alpha_ts, var_ts = process.transition(s, t)
    assert_close(alpha_tu * alpha_us, alpha_ts, rtol=1e-12, atol=0)
    assert_close(alpha_tu**2 * var_us + var_tu, var_ts, rtol=1e-10, atol=0)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = process.alpha_sigma(s), process.alpha_sigma(t)
    assert_close(alpha_ts * alpha_s, alpha_t, rtol=1e-12, atol=0)
    assert_close(alpha_ts**2 * sigma_s**2 + var_ts, sigma_t**2, rtol=1e-12, atol=0)


@given(processes, ordered_times(3))
def test_posteriors_compose(process, times):
    """Stepping t -> u -> s through the posteriors is stepping t -> s, as Markov processes must."""
    s, u, t = times
    a1, b1, var1 = process.coefficients(t, u)
    a2, b2, var2 = process.coefficients(u, s)
    a, b, var = process.coefficients(t, s)
    assert_close(a2 * a1, a, rtol=1e-12, atol=0)
    assert_close(a2 * b1 + b2, b, rtol=1e-12, atol=1e-15)
    assert_close(a2**2 * var1 + var2, var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ends_are_finite_and_exact(name, eta):
    process = PROCESSES[name]
    start, end = process.alpha_sigma(1.0), process.alpha_sigma(0.0)
    if name == "flow-as-ve":
        assert start[1] == math.inf  # no picture left and no scale to measure noise by
        return
    a, b, var = process.coefficients(1.0, 0.0, eta=eta)
    assert_close(a * start[0] + b, end[0], rtol=1e-12, atol=1e-15)
    assert_close(a**2 * start[1] ** 2 + var, end[1] ** 2, rtol=1e-12, atol=1e-15)
    if end[1] == 0:
        assert (a, b, var) == (0, 1, 0)


@pytest.mark.parametrize("name", ["flow", "flow-shifted", "zero-snr-table"])
@pytest.mark.parametrize("t", [0.01, 0.5, 0.999])
def test_the_deterministic_step_to_pure_noise_is_its_limit(name, t):
    process = PROCESSES[name]
    (alpha, sigma), (nothing, end) = process.alpha_sigma(t), process.alpha_sigma(1.0)
    assert nothing == 0
    a, b, var = process.coefficients(t, 1.0, eta=0.0)
    assert_close(torch.stack([a, b, var]), torch.stack([end / sigma, -alpha * end / sigma, torch.zeros(()).double()]))
    x0, eps = normal(2, 3), normal(2, 3, seed=1)
    mean, _ = process.posterior(process.diffuse(x0, t, eps), x0, t, 1.0, eta=0.0)
    assert_close(mean, end * eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_standing_still_changes_nothing(name, t):
    process, z = PROCESSES[name], normal(2, 3)
    for eta in (0.0, 0.5, 1.0):
        a, b, var = process.coefficients(t, t, eta=eta)
        assert (a, b, var) == (1, 0, 0)
    mean, var = process.posterior(z, normal(2, 3, seed=1), t, t)
    assert torch.equal(process.sample(mean, var, normal(2, 3, seed=2)), z)
    assert process.transition(t, t) == (1, 0)


@given(processes, ordered_times())
def test_implied_x0_inverts_the_deterministic_step(process, times):
    s, t = times
    z, x0 = normal(3, 4, seed=3), normal(3, 4, seed=4)
    z_s, var = process.posterior(z, x0, t, s, eta=0.0)
    assert var == 0
    _, b, _ = process.coefficients(t, s, eta=0.0)
    assert_close(process.implied_x0(z, z_s, t, s), x0, rtol=1e-12 / b.item(), atol=1e-12 / b.item())
    back, _ = process.posterior(z_s, x0, s, t, eta=0.0)  # and the step runs both ways
    assert_close(back, z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(5,), (5, 2), (1, 2), (5, 1, 4, 3), (1, 1, 4, 1)])
@pytest.mark.parametrize("name", ["cosine", "karras", "flow", "scaled-linear-table"])
def test_times_line_up_with_the_first_dimensions(name, shape):
    process = PROCESSES[name]
    t = 0.2 + 0.7 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = t / 2
    full_t, full_s = (pad_right(x, X0.ndim).expand_as(X0) for x in (t, s))
    z = process.diffuse(X0, t, EPS)
    mean, var = process.posterior(z, X0, t, s)
    v = process.convert(EPS, z, t, "eps", "v")
    for index in product(*(range(n) for n in X0.shape)):
        one = tuple(slice(i, i + 1) for i in index)
        t_i, s_i = full_t[index].item(), full_s[index].item()
        assert_close(z[one], process.diffuse(X0[one], t_i, EPS[one]), rtol=0, atol=0)
        mean_i, var_i = process.posterior(z[one], X0[one], t_i, s_i)
        assert_close(mean[one], mean_i, rtol=0, atol=0)
        assert_close(var.expand_as(z)[index], var_i, rtol=0, atol=0)
        assert_close(v[one], process.convert(EPS[one], z[one], t_i, "eps", "v"), rtol=0, atol=0)


def test_time_with_too_many_dimensions_is_refused():
    with pytest.raises(BadInput, match="dimensions"):
        GaussianProcess(Cosine()).diffuse(normal(2, 3), torch.rand(2, 3, 1), normal(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_only_rounds(dtype):
    """Coefficients are those of float64, rounded once, even where tan and exp would fail in the type of z."""
    for process, t in product((GaussianProcess(Cosine()), GaussianProcess(Karras())), (1e-3, 0.5, 0.999)):
        exact = process.alpha_sigma(t)
        for low, high in zip(process.alpha_sigma(t, X0.to(dtype)), exact, strict=True):
            assert low.dtype == dtype
            assert low == high.to(dtype)
        assert process.diffuse(X0.to(dtype), t, EPS.to(dtype)).dtype == dtype


def test_variance_rules():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    rules = {"vp": lambda a, s: a**2 + s**2, "flow": lambda a, s: a + s, "ve": lambda a, s: a}
    for path, rule in rules.items():
        alpha, sigma = GaussianProcess(Cosine(), path).alpha_sigma(t)
        assert_close(rule(alpha, sigma), torch.ones_like(t), rtol=1e-14, atol=0)
        assert_close(2 * (alpha / sigma).log(), Cosine().logsnr(t), rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(st.integers(1, 999), st.integers(1, 400), st.sampled_from(["epsilon", "v_prediction", "sample"]))
def test_step_is_diffusers_ddim_step(timestep, stride, kind):
    """In float64, with eta between 0 and 1, against the scheduler's own arithmetic on the same table."""
    names = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    scheduler = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", prediction_type=kind, clip_sample=False, set_alpha_to_one=True
    )
    process = GaussianProcess(DiscreteSchedule.from_alphas_cumprod(scheduler.alphas_cumprod))
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.num_inference_steps = 1000 // stride
    previous = timestep - 1000 // scheduler.num_inference_steps
    z, pred, noise = normal(2, 3, seed=1), normal(2, 3, seed=2), normal(2, 3, seed=3)
    t, s = (timestep + 1) / 1000, max(previous + 1, 0) / 1000
    for eta in (0.0, 0.3, 1.0):
        theirs = scheduler.step(pred, timestep, z, eta=eta, variance_noise=noise).prev_sample
        mean, var = process.posterior(z, process.convert(pred, z, t, names[kind], "x0"), t, s, eta)
        assert_close(process.sample(mean, var, noise), theirs, rtol=1e-11, atol=1e-11)


def test_posterior_is_diffusers_ddpm_posterior():
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    process = GaussianProcess(DiscreteSchedule.from_alphas_cumprod(scheduler.alphas_cumprod))
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = torch.tensor(1.0).double()
    z, x0 = normal(2, 3, seed=1), normal(2, 3, seed=2)
    for timestep in (1, 10, 500, 999):
        mean, var = process.posterior(z, x0, (timestep + 1) / 1000, timestep / 1000)
        assert_close(scheduler._get_variance(timestep), var, rtol=1e-10, atol=0)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
        theirs = scheduler.step(x0, timestep, z, generator=generator).prev_sample
        assert_close(process.sample(mean, var, noise), theirs, rtol=1e-10, atol=1e-10)


def test_unknown_prediction_and_eta():
    process = GaussianProcess(RectifiedFlow())
    with pytest.raises(BadInput, match="unknown prediction 'noise'"):
        process.convert(EPS, X0, 0.5, "noise", "x0")
    with pytest.raises(BadInput, match="eta"):
        process.posterior(EPS, X0, 0.5, 0.4, eta=1.5)


PICTURES = normal(3, 2, 4, 4, seed=6)


def test_a_blurring_process_fits_the_seam():
    """Another basis and another alpha: every formula follows, against dense linear algebra in pixel space."""
    process = Blur(Cosine(-10, 10))
    t, s = torch.tensor([0.3, 0.6, 0.9]).double(), torch.tensor([0.1, 0.5, 0.2]).double()
    assert_close(process.to_basis(PICTURES).numpy(), dctn(PICTURES.numpy(), axes=(-2, -1), norm="ortho"))
    noise = normal(*PICTURES.shape, seed=7)
    z = process.diffuse(PICTURES, t, noise)
    mean, var = process.posterior(z, PICTURES, t, s)
    basis = torch.kron(process.dct, process.dct)  # rows: basis vectors of the flattened picture
    for i in range(3):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (process.alpha_sigma(x[i : i + 1], z[:1]) for x in (t, s))
        blur_t, blur_s = (basis.T @ torch.diag(x.flatten()) @ basis for x in (alpha_t, alpha_s))
        x0, z_i = PICTURES[i].reshape(2, 16), z[i].reshape(2, 16)
        assert_close(z_i, x0 @ blur_t.T + sigma_t.item() * noise[i].reshape(2, 16), rtol=1e-10, atol=1e-10)
        step = blur_t @ torch.linalg.inv(blur_s)
        joint = sigma_s.item() ** 2 * step  # covariance of z_t and z_s given x0
        gain = joint.T / sigma_t.item() ** 2
        expected = x0 @ blur_s.T + (z_i - x0 @ blur_t.T) @ gain.T
        assert_close(mean[i].reshape(2, 16), expected, rtol=1e-8, atol=1e-8)
        covariance = sigma_s.item() ** 2 * torch.eye(16, dtype=torch.float64) - gain @ joint
        got = basis.T @ torch.diag(var[i].flatten()) @ basis
        assert_close(got, covariance, rtol=1e-8, atol=1e-8)
    for source, target in product(KINDS, KINDS):
        pred = process.convert(noise, z, t, "eps", source)
        expected = process.convert(noise, z, t, "eps", target)
        assert_close(process.convert(pred, z, t, source, target), expected, rtol=1e-6, atol=1e-6)


def test_blurring_without_blur_is_the_isotropic_process():
    still, plain = Blur(Cosine(-10, 10), strength=0.0), GaussianProcess(Cosine(-10, 10))
    z, x0 = normal(2, 1, 4, 4, seed=8), normal(2, 1, 4, 4, seed=9)
    means = [process.posterior(z, x0, 0.8, 0.3)[0] for process in (still, plain)]
    assert_close(*means, rtol=1e-12, atol=1e-12)
