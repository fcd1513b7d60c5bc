"""Samplers against closed forms, exact denoisers and each other; everything in float64 unless said
otherwise."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from noise_cases import PROCESSES, Blur, normal
from sfumato.errors import BadInput
from sfumato.noise import Cosine, Denoiser, GaussianProcess, Karras, LinearBeta, RectifiedFlow
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.sample import ddim, ddpm, dpmpp_2m, heun, times
from sfumato.sample.samplers import draw

VARIANCE = torch.tensor([0.04, 1.0, 3.0], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
GAUSSIAN = GaussianMixture.gaussian(MEAN, torch.diag(VARIANCE))
MIXTURE = GaussianMixture.isotropic(
    torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.8, -1.4]]), 0.25, torch.tensor([0.5, 0.3, 0.2])
)


def gaussian_flow(process: GaussianProcess, z: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """The probability-flow ODE of Gaussian data, solved: standardised deviations stay what they are."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    scale = ((alpha_s**2 * VARIANCE + sigma_s**2) / (alpha_t**2 * VARIANCE + sigma_t**2)).sqrt()
    return alpha_s * MEAN + scale * (z - alpha_t * MEAN)


def slopes(errors: list[float], steps: list[int]) -> float:
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (heun, 2), (dpmpp_2m, 2)])
@pytest.mark.parametrize(
    "schedule", [Cosine(), LinearBeta(), RectifiedFlow()], ids=["cosine", "linear", "flow"]
)
def test_order_on_gaussian_data(sampler, order, schedule):
    """Against the closed form of the ODE, from t = 0.9 to 0.1: the error falls as steps^-order."""
    process = GaussianProcess(schedule)
    denoiser, z = MixtureDenoiser(process, GAUSSIAN), normal(8, 3)
    exact = gaussian_flow(process, z, 0.9, 0.1)
    steps = [20, 40, 80, 160]
    grids = [times.logsnr(schedule, n, 0.9, 0.1) for n in steps]
    errors = [(sampler(denoiser, z, grid) - exact).abs().max().item() for grid in grids]
    assert order - 0.25 < slopes(errors, steps) < order + 0.5
    assert errors[-1] < 0.03


@pytest.mark.parametrize("sampler, least", [(ddim, 0.8), (heun, 1.7), (dpmpp_2m, 1.7)])
def test_order_on_a_mixture(sampler, least):
    """Down to clean pictures on EDM's grid, against a fine solution from the same noise."""
    process = GaussianProcess(Karras(0.02, 20.0))
    denoiser, z = MixtureDenoiser(process, MIXTURE, "eps"), 20.0 * normal(64, 2)
    fine = heun(denoiser, z, times.uniform(600))
    steps = [30, 60, 120]
    errors = [(sampler(denoiser, z, times.uniform(n)) - fine).square().mean().sqrt().item() for n in steps]
    assert slopes(errors, steps) > least


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m])
@pytest.mark.parametrize("name", ["cosine", "flow", "linear", "zero-snr-table", "scaled-linear-table"])
def test_whole_range_on_gaussian_data(sampler, name):
    """From pure noise to t = 0, where log-SNRs may be infinite, in 200 uniform steps (the last one first
    order)."""
    process = PROCESSES[name]
    z = process.diffuse(torch.zeros(8, 3, dtype=torch.float64), 1.0, normal(8, 3))
    got = sampler(MixtureDenoiser(process, GAUSSIAN), z, times.uniform(200))
    assert (got - gaussian_flow(process, z, 1.0, 0.0)).abs().max() < (0.1 if sampler is ddim else 0.03)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_moments_of_stochastic_sampling(eta):
    """For Gaussian data each step is linear, so mean and variance of the samples follow a recursion
    exactly."""
    process, n = GaussianProcess(Cosine()), 20_000
    grid = times.uniform(12)
    alpha, sigma = process.alpha_sigma(1.0)
    mean, var = torch.zeros(3, dtype=torch.float64), sigma**2 * torch.ones(3, dtype=torch.float64)
    for t, s in pairwise(grid):
        alpha, sigma = process.alpha_sigma(t)
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        a, b, extra = process.coefficients(t, s, eta=eta)
        mean, var = (a + b * gain) * mean + b * (1 - alpha * gain) * MEAN, (a + b * gain) ** 2 * var + extra
    denoiser = MixtureDenoiser(process, GAUSSIAN, "v")
    generator = torch.Generator().manual_seed(1)
    samples = ddim(denoiser, normal(n, 3), grid, eta=eta, generator=generator)
    assert ((samples.mean(0) - mean).abs() < 4 * (var / n).sqrt()).all()
    assert ((samples.var(0) - var).abs() < 4 * var * math.sqrt(2 / n)).all()


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Twice E|x - y| minus E|x - x'| minus E|y - y'|, each unbiased."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return (2 * torch.cdist(x, y).mean() - within).item()


SAMPLERS = {
    "ddim": (ddim, "cosine", 60),
    "ddpm": (ddpm, "cosine", 150),
    "ddim-half": (lambda *a, **k: ddim(*a, eta=0.5, **k), "flow", 100),
    "heun": (heun, "karras", 40),
    "dpmpp": (dpmpp_2m, "scaled-linear-table", 50),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_mixture_from_noise_to_data(name):
    """Means, spreads and shares of the modes within four standard errors; energy distance within the range
    that twenty pairs of exact draws show. The control, three steps, falls outside."""
    sampler, process, steps = SAMPLERS[name]
    process, n = PROCESSES[process], 1000
    generator = torch.Generator().manual_seed(2)
    truth = [MIXTURE.sample(n, generator) for _ in range(8)]
    null = [energy_distance(x, y) for i, x in enumerate(truth) for y in truth[:i]]
    limit = np.mean(null) + 5 * np.std(null)
    z = process.alpha_sigma(1.0)[1] * torch.randn(n, 2, dtype=torch.float64, generator=generator)
    denoiser = MixtureDenoiser(process, MIXTURE)
    samples = sampler(denoiser, z, times.uniform(steps), generator=generator)
    assert energy_distance(samples, truth[0]) < limit
    nearest = torch.cdist(samples, MIXTURE.means).argmin(1)
    for mode, share in enumerate(MIXTURE.weights.tolist()):
        cluster = samples[nearest == mode]
        assert abs(len(cluster) / n - share) < 4 * math.sqrt(share * (1 - share) / n)
        assert ((cluster.mean(0) - MIXTURE.means[mode]).abs() < 4 * 0.25 / math.sqrt(len(cluster))).all()
        relative_error = cluster.std(0) / 0.25 - 1
        assert (relative_error.abs() < 4 / math.sqrt(2 * len(cluster)) + 0.02).all()
    assert energy_distance(sampler(denoiser, z, times.uniform(3), generator=generator), truth[0]) > limit


def test_one_ddpm_step_is_the_posterior():
    process, z = PROCESSES["cosine"], normal(4, 3)
    denoiser = MixtureDenoiser(process, GAUSSIAN, "eps")
    got = ddpm(denoiser, z, torch.tensor([0.7, 0.4]), generator=torch.Generator().manual_seed(3))
    t, s = torch.tensor([0.7, 0.4])
    mean, var = process.posterior(z, MixtureDenoiser(process, GAUSSIAN)(z, t), t, s)
    assert_close(got, mean + var.sqrt() * normal(4, 3, seed=3), rtol=1e-12, atol=1e-12)
    got = ddim(
        denoiser,
        z,
        torch.tensor([0.7, 0.4]),
        eta=1.0,
        generator=torch.Generator().manual_seed(3),
        final_noise=False,
    )
    assert_close(got, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_variance_between_posterior_and_forward(share):
    """From z_t = 0 and x0 = 0 a step is its noise alone: at 1 with the variance of q(z_t | z_s) before scaling."""
    process, n = GaussianProcess(Cosine()), 40_000
    still = MixtureDenoiser(process, GaussianMixture.isotropic(torch.zeros(1, 1), 1e-9))
    t, s = torch.tensor([0.7, 0.6], dtype=torch.float64)
    z = torch.zeros(n, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    got = ddpm(still, z, torch.stack([t, s]), generator=generator, variance=share).var()
    low, high = process.coefficients(t, s)[2], process.transition(s, t)[1]
    expected = low ** (1 - share) * high**share
    assert abs(got - expected) < 4 * expected * math.sqrt(2 / n)
    assert low < 0.9 * high


def test_a_wider_variance_ends_where_there_is_no_noise():
    flow = GaussianProcess(RectifiedFlow())
    z = normal(4, 2)
    x = ddpm(MixtureDenoiser(flow, MIXTURE), z, times.uniform(5), generator=torch.Generator(), variance=0.5)
    assert torch.isfinite(x).all()
    with pytest.raises(BadInput, match="variance"):
        ddpm(MixtureDenoiser(flow, MIXTURE), z, times.uniform(5), generator=torch.Generator(), variance=2.0)


def test_inversion_runs_ddim_backwards():
    process, x = PROCESSES["cosine"], GAUSSIAN.sample(6, torch.Generator().manual_seed(0))
    denoiser = MixtureDenoiser(process, GAUSSIAN)
    errors = []
    for steps in (50, 100, 200):
        grid = times.uniform(steps, 0.95, 0.0)
        errors.append((ddim(denoiser, ddim(denoiser, x, grid.flip(0)), grid) - x).abs().max().item())
    assert slopes(errors, [50, 100, 200]) > 0.8
    assert errors[-1] < 0.05


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m])
def test_a_time_for_every_frame(sampler):
    """Independent frames with times of their own are sampled as each would be alone; frames at rest stay as
    is."""
    process, frames = PROCESSES["cosine"], normal(5, 3)
    data = GaussianMixture.gaussian(torch.zeros(3), torch.diag(VARIANCE))
    single = GaussianMixture.gaussian
    starts = torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64)
    ends = torch.tensor([0.1, 0.4, 0.5], dtype=torch.float64)
    grid = starts + (ends - starts) * torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
    got = sampler(MixtureDenoiser(process, data), frames, grid[:, None, :])
    for i in range(2):
        alone = MixtureDenoiser(process, single(torch.zeros(1), VARIANCE[i].reshape(1, 1)))
        expected = sampler(alone, frames[:, i : i + 1], grid[:, i])
        assert_close(got[:, i : i + 1], expected, rtol=1e-10, atol=1e-10)
    assert_close(got[:, 2], frames[:, 2], rtol=0, atol=0 if sampler is ddim else 1e-12)


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m])
def test_in_another_basis(sampler):
    """Data whose covariance the cosine transform diagonalises: the blurred ODE is solved frequency by
    frequency."""
    process = Blur(Cosine(-10, 10), strength=1.0)
    power = torch.linspace(0.2, 2, 16, dtype=torch.float64)
    dct = torch.kron(process.dct, process.dct)
    data = GaussianMixture.gaussian(torch.zeros(1, 4, 4), dct.T @ torch.diag(power) @ dct)
    z = normal(3, 1, 4, 4)
    got = sampler(MixtureDenoiser(process, data), z, times.uniform(100, 0.9, 0.1))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (process.alpha_sigma(x, z) for x in (0.9, 0.1))
    power = power.reshape(4, 4)
    scale = ((alpha_s**2 * power + sigma_s**2) / (alpha_t**2 * power + sigma_t**2)).sqrt()
    exact = process.from_basis(scale * process.to_basis(z))
    assert (got - exact).abs().max() < (0.06 if sampler is ddim else 2e-3)


def test_batching_never_changes_a_sample():
    denoiser, z = MixtureDenoiser(PROCESSES["cosine"], MIXTURE), normal(3, 2)
    grid, seeds = times.uniform(5), [7, 8, 9]

    def generators(chosen):
        return [torch.Generator().manual_seed(s) for s in chosen]

    together = ddpm(denoiser, z, grid, generator=generators(seeds))
    for i, seed in enumerate(seeds):
        alone = ddpm(denoiser, z[i : i + 1], grid, generator=generators([seed]))
        assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    with pytest.raises(BadInput, match="generators"):
        draw(z, generators([1, 2]))


@pytest.mark.parametrize("sampler", [ddim, ddpm, heun, dpmpp_2m])
def test_callback_sees_every_step(sampler):
    denoiser, seen = MixtureDenoiser(PROCESSES["cosine"], MIXTURE), []
    grid = times.uniform(4)
    final = sampler(
        denoiser, normal(2, 2), grid, generator=torch.Generator(), callback=lambda *step: seen.append(step)
    )
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [t.item() for _, t, _ in seen] == grid[1:].tolist()
    assert seen[-1][2] is final
    assert isinstance(denoiser, Denoiser)


def test_misuse_is_explained():
    denoiser, z = MixtureDenoiser(PROCESSES["cosine"], MIXTURE), normal(2, 2)
    with pytest.raises(BadInput, match="generator"):
        ddpm(denoiser, z, times.uniform(3))
    with pytest.raises(BadInput, match="decrease"):
        ddpm(denoiser, z, times.uniform(3).flip(0), generator=torch.Generator())
    with pytest.raises(BadInput, match="two times"):
        ddim(denoiser, z, torch.tensor([1.0]))
    with pytest.raises(BadInput, match="at least one step"):
        times.uniform(0)
    with pytest.raises(BadInput, match="log-SNR at t"):
        times.logsnr(RectifiedFlow(), 5)


def test_grids():
    schedule = Cosine()
    grid = times.logsnr(schedule, 10, 0.9, 0.1)
    assert (grid[0], grid[-1]) == (0.9, 0.1)
    rises = schedule.logsnr(grid).diff()
    assert_close(rises, rises.mean().expand(10), rtol=1e-9, atol=0)
    grid = times.karras(schedule, 10, 0.9, 0.1, rho=5)
    roots = torch.exp(-schedule.logsnr(grid) / 10)
    assert_close(roots.diff(), roots.diff().mean().expand(10), rtol=1e-9, atol=0)
    # On EDM's own schedule its grid is uniform in t.
    assert_close(times.karras(Karras(), 10), times.uniform(10), rtol=0, atol=1e-12)
