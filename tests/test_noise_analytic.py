"""Exact denoisers against automatic differentiation, dense linear algebra and quadrature, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from noise_cases import PROCESSES, Blur, normal
from sfumato.noise import Cosine, GaussianProcess, Prediction, RectifiedFlow
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser

NAMES = ["cosine", "scaled-linear-table", "karras", "flow", "cosine-as-flow"]


def mixture(*dims: int) -> GaussianMixture:
    size = torch.Size(dims).numel()
    factors = 0.3 * normal(3, size, size, seed=1) + 0.2 * torch.eye(size)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixture(normal(3, *dims, seed=2), factors @ factors.mT, weights)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (6,), (6, 2), (1, 2, 3)])
def test_score_is_the_gradient_of_log_density(name, shape):
    """For one time, one per picture, per row and per element."""
    process, data = PROCESSES[name], mixture(2, 3)
    t = 0.2 + 0.6 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = process.diffuse(normal(6, 2, 3, seed=3), t, normal(6, 2, 3, seed=4)).requires_grad_()
    cond = torch.rand(6, 3, generator=torch.Generator().manual_seed(5))
    for weights in (None, cond):
        denoiser = MixtureDenoiser(process, data, "score")
        gradient = torch.autograd.grad(denoiser.log_prob(z, t, weights).sum(), z)[0]
        assert_close(denoiser(z, t, weights), gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", Prediction.__args__)
def test_predictions_belong_together(kind):
    process, data = PROCESSES["cosine"], mixture(2, 2)
    z = normal(4, 2, 2)
    x0 = MixtureDenoiser(process, data, "x0")(z, 0.4)
    pred = MixtureDenoiser(process, data, kind)(z, 0.4)
    assert_close(process.convert(pred, z, 0.4, kind, "x0"), x0, rtol=1e-12, atol=1e-12)


def test_density_of_one_gaussian():
    process, covariance = PROCESSES["cosine"], mixture(3).covariances[0]
    denoiser = MixtureDenoiser(process, GaussianMixture.gaussian(normal(3, seed=7), covariance))
    alpha, sigma = process.alpha_sigma(0.3)
    law = MultivariateNormal(
        alpha * normal(3, seed=7), alpha**2 * covariance + sigma**2 * torch.eye(3, dtype=torch.float64)
    )
    z = normal(5, 3)
    assert_close(denoiser.log_prob(z, 0.3), law.log_prob(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_posterior_mean_by_quadrature(name):
    """E[x0 | z] of a one-dimensional mixture, integrated on a grid (spectrally exact for Gaussians)."""
    process = PROCESSES[name]
    data = GaussianMixture.isotropic(torch.tensor([[-1.0], [0.5], [2.0]]), 0.3)
    x = torch.linspace(-4, 5, 4001, dtype=torch.float64)
    prior = torch.exp(-((x[:, None] - data.means[:, 0]) ** 2) / (2 * 0.3**2)).sum(1)
    z = torch.tensor([[-0.7], [0.1], [1.3]], dtype=torch.float64)
    for t in (0.3, 0.6):
        alpha, sigma = process.alpha_sigma(t)
        log_likelihood = -((z - alpha * x) ** 2) / (2 * sigma**2)
        weight = prior * torch.exp(log_likelihood - log_likelihood.amax(1, keepdim=True))
        mean = (weight * x).sum(1) / weight.sum(1)
        assert_close(MixtureDenoiser(process, data)(z, t)[:, 0], mean, rtol=1e-8, atol=1e-8)


def test_ends_are_exact():
    data, z = mixture(2), normal(4, 2)
    x0, eps = (MixtureDenoiser(GaussianProcess(RectifiedFlow()), data, kind) for kind in ("x0", "eps"))
    mean = (data.weights[:, None] * data.means).sum(0)
    assert_close(x0(z, 1.0), mean.expand(4, 2), rtol=1e-12, atol=1e-12)
    assert_close(eps(z, 1.0), z, rtol=1e-12, atol=1e-12)
    assert_close(x0(z, 0.0), z, rtol=1e-10, atol=1e-10)
    assert_close(eps(z, 0.0), torch.zeros_like(z), rtol=0, atol=0)


def test_in_another_basis():
    """The score of a blurred mixture is still the gradient of its density, taken in pixel space."""
    process, data = Blur(Cosine(-10, 10)), mixture(1, 4, 4)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    z = process.diffuse(normal(3, 1, 4, 4, seed=1), t, normal(3, 1, 4, 4, seed=2)).requires_grad_()
    denoiser = MixtureDenoiser(process, data, "score")
    gradient = torch.autograd.grad(denoiser.log_prob(z, t).sum(), z)[0]
    assert_close(denoiser(z, t), gradient, rtol=1e-7, atol=1e-8)
    dct = torch.kron(process.dct, process.dct)
    alpha, sigma = process.alpha_sigma(t[:1], z[:1])
    blur = dct.T @ torch.diag(alpha.flatten()) @ dct
    components = [
        MultivariateNormal(
            blur @ m.flatten(), blur @ c @ blur.T + sigma.item() ** 2 * torch.eye(16, dtype=torch.float64)
        )
        for m, c in zip(data.means, data.covariances, strict=True)
    ]
    densities = torch.stack([law.log_prob(z[:1].reshape(1, 16)) for law in components], dim=1)
    expected = torch.logsumexp(data.weights.log() + densities, dim=1)
    assert_close(denoiser.log_prob(z[:1], t[:1]), expected, rtol=1e-8, atol=1e-8)


def test_draws_have_the_moments():
    data, n = mixture(2), 40_000
    draws = data.sample(n, torch.Generator().manual_seed(0))
    mean = (data.weights[:, None] * data.means).sum(0)
    spread = data.covariances + torch.einsum("ki,kj->kij", data.means - mean, data.means - mean)
    covariance = (data.weights[:, None, None] * spread).sum(0)
    scale = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 4 * scale / n**0.5).all()
    # Five standard errors of a Gaussian's covariance; a bounded mixture's is no larger than about twice that.
    assert ((draws.T.cov() - covariance).abs() < 10 * torch.outer(scale, scale) / n**0.5).all()
