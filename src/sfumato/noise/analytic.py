"""Denoisers that are exactly right: Gaussian-mixture data under any Gaussian process, in float64.

With these the score of every noisy marginal is known in closed form, so samplers, losses and guidance can be
tested against the truth instead of against a trained network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .process import GaussianProcess, Prediction, compose
from .schedule import Time


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Data made of Gaussians: ``weights`` (sum 1), ``means`` and full ``covariances`` over the flattened
    dims."""

    means: Float[Tensor, "component *dims"]
    covariances: Float[Tensor, "component size size"]
    weights: Float[Tensor, "component"]

    @classmethod
    def isotropic(
        cls,
        means: Float[Tensor, "component *dims"],
        std: float,
        weights: Float[Tensor, "component"] | None = None,
    ) -> GaussianMixture:
        """Round components of standard deviation ``std``, equally likely unless ``weights`` says
        otherwise."""
        means = means.double()
        components, size = means.shape[0], means[0].numel()
        covariances = (std**2 * torch.eye(size, dtype=torch.float64)).expand(components, size, size)
        weights = torch.full((components,), 1 / components) if weights is None else weights
        return cls(means, covariances, weights.double() / weights.double().sum())

    @classmethod
    def gaussian(
        cls, mean: Float[Tensor, "*dims"], covariance: Float[Tensor, "size size"]
    ) -> GaussianMixture:
        """A single Gaussian."""
        return cls(mean.double()[None], covariance.double()[None], torch.ones(1, dtype=torch.float64))

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n *dims"]:
        """``n`` exact draws."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        factors = torch.linalg.cholesky(self.covariances)[component]
        noise = torch.randn(n, factors.shape[-1], 1, dtype=torch.float64, generator=generator)
        return self.means[component] + (factors @ noise).reshape(n, *self.means.shape[1:])


@dataclass(frozen=True, eq=False)
class MixtureDenoiser:
    """The exact denoiser of a Gaussian mixture: E[x0 | z_t], or what it is as any other prediction.

    ``cond`` reweights the components: a tensor of weights, [component] or [batch, component]; None is the whole
    mixture. With Sigma_k = alpha C_k alpha + sigma^2 in the basis of the process and
    w_k = Sigma_k^-1 (z - alpha mu_k): E[x0 | z, k] = mu_k + C_k alpha w_k and E[eps | z, k] = sigma w_k,
    averaged over p(k | z). Finite wherever Sigma_k can be inverted, so also at alpha = 0 and, for full-rank
    data, at sigma = 0.
    """

    process: GaussianProcess
    data: GaussianMixture
    prediction: Prediction = "x0"

    def __call__(self, z: Float[Tensor, "batch *dims"], t: Time, cond: Tensor | None = None) -> Tensor:
        double = z.double()
        alpha, sigma = self.process.alpha_sigma(t, double)
        means, covariances = self._in_basis()
        weighted, log_likelihood, rows = self._solve(double, alpha, sigma)
        share = torch.softmax(self._log_weights(cond) + log_likelihood, dim=1)[..., None]
        eps = (share * weighted).sum(1).reshape(z.shape) * sigma
        spread = torch.einsum("kij,bkj->bki", covariances, rows[:, None] * weighted)
        x0 = (share * (means + spread)).sum(1).reshape(z.shape)
        return self.process.from_basis(compose(x0, eps, alpha, sigma, self.prediction)).to(z.dtype)

    def log_prob(
        self, z: Float[Tensor, "batch *dims"], t: Time, cond: Tensor | None = None
    ) -> Float[Tensor, "batch"]:
        """log p(z_t), exact."""
        double = z.double()
        _, log_likelihood, _ = self._solve(double, *self.process.alpha_sigma(t, double))
        return torch.logsumexp(self._log_weights(cond) + log_likelihood, dim=1)

    def _log_weights(self, cond: Tensor | None) -> Float[Tensor, "..."]:
        weights = self.data.weights if cond is None else cond.double()
        return torch.log(weights / weights.sum(-1, keepdim=True))

    def _in_basis(self) -> tuple[Tensor, Tensor]:
        means, covariances = self.data.means, self.data.covariances
        size = covariances.shape[-1]
        for _ in range(2):  # C -> C B^T, then the other side
            rows = self.process.to_basis(covariances.reshape(-1, *means.shape[1:]))
            covariances = rows.reshape(-1, size, size).transpose(1, 2)
        return self.process.to_basis(means).reshape(-1, size), covariances

    def _solve(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w_k, log N(z; alpha mu_k, Sigma_k) and alpha with its dimensions flattened, [batch or 1, size]."""
        means, covariances = self._in_basis()
        batch, size = z.shape[0], means.shape[1]
        times = max(x.shape[0] if x.ndim == z.ndim else 1 for x in (alpha, sigma))
        alpha, sigma = (x.expand(times, *z.shape[1:]).reshape(times, size) for x in (alpha, sigma))
        noisy = alpha[:, None, :, None] * covariances * alpha[:, None, None, :]
        factor = torch.linalg.cholesky(noisy + torch.diag_embed(sigma**2)[:, None])
        residual = self.process.to_basis(z).reshape(batch, 1, size) - alpha[:, None] * means
        # One factorisation per distinct time, however many pictures share it.
        columns = residual.reshape(times, batch // times, -1, size).permute(0, 2, 3, 1)
        solved = torch.cholesky_solve(columns, factor).permute(0, 3, 1, 2).reshape(residual.shape)
        log_det = torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1)
        distance = (residual * solved).sum(-1)
        return solved, -distance / 2 - log_det - size * math.log(2 * math.pi) / 2, alpha
