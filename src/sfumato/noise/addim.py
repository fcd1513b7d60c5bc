"""The step of aDDIM: DDIM that puts back the variance which a mean prediction takes away.

arXiv:2403.06807, algorithm 3. A denoiser predicts the mean of x0, so every DDIM step loses the spread of x0 around
it, and samples come out too smooth. Here the predicted noise is lengthened until the step has the norm it should have.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .process import GaussianProcess, pad_right
from .schedule import Time, float64


def posterior_variance(process: GaussianProcess, t: Time, prior: float = 0.5) -> Float[Tensor, "..."]:
    """Var[x0 | z_t] in each dimension, in float64, if all were independent and N(m, ``prior``).

    It is 1 / (1 / prior + SNR(t)); the paper's rule x_var = 0.1 / (2 + SNR) is a tenth of it at ``prior`` = 0.5.
    """
    return 1 / (1 / prior + process.schedule.logsnr(t).exp())


def addim_step(
    process: GaussianProcess,
    z: Float[Tensor, "batch *dims"],
    x0: Float[Tensor, "batch *dims"],
    t: Time,
    s: Time,
    x0_var: Time,
) -> Float[Tensor, "batch *dims"]:
    """From t to s < t, with a mean ``x0`` around which the truth has variance ``x0_var`` in each dimension.

    With eps = (z - alpha_t x0) / sigma_t of d dimensions and b = alpha_s - alpha_t sigma_s / sigma_t:
    z_s = alpha_s x0 + sqrt(sigma_s^2 + d b^2 x0_var / ||eps||^2) eps, so that
    ||z_s - alpha_s x0||^2 = sigma_s^2 ||eps||^2 + d b^2 x0_var. ``x0_var`` = 0 is DDIM bit for bit.

    Args:
        x0_var: one for all, or one per picture; broadcasts against z as a time does.
    """
    mean, _ = process.posterior(z, x0, t, s, eta=0.0)
    alpha, sigma = process.alpha_sigma(t, z)
    _, sigma_s = process.alpha_sigma(s, z)
    _, b, _ = process.coefficients(t, s, z, eta=0.0)
    eps = (process.to_basis(z) - alpha * process.to_basis(x0)) / sigma
    var = pad_right(float64(x0_var), z.ndim).to(z)
    return mean + process.from_basis(lengthening(eps, sigma_s, b.square() * var) * eps)


def lengthening(
    eps: Float[Tensor, "batch *dims"], sigma: Tensor, var: Tensor
) -> Float[Tensor, "batch *dims"]:
    """sqrt(sigma^2 + d var / ||eps||^2) - sigma without cancellation, and exactly 0 where ``var`` is."""
    tiny = torch.finfo(eps.dtype).tiny
    mean_square = eps.flatten(1).square().mean(1).reshape(-1, *[1] * (eps.ndim - 1))
    added = var / mean_square.clamp(min=tiny)
    return added / ((sigma.square() + added).sqrt() + sigma).clamp(min=tiny)
