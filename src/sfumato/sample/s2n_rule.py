"""A step of the generalised backward equation of signal-to-noise diffusion (arXiv:2408.04221): its knobs and weights.

In the coordinate kappa = sigma / alpha every schedule is the same process, and for every rho >= 0

    dy = (1 + rho^2) eps(y) dkappa + rho sqrt(2 kappa dkappa) dW,  y = z / alpha,

run towards smaller kappa, has the right marginals: rho = 0 is the probability-flow ODE, rho = 1 the reverse SDE. A step
from t to s, solved exactly with the prediction held fixed, is

    z_s = alpha_s x0 + sigma_s (e eps + n xi),  xi standard normal,

where e and n depend on r = kappa_s / kappa_t alone (`weights`). What is held fixed is the knob ``freeze``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.fields import NotNegative, Share, check

from ..noise.process import GaussianProcess
from ..noise.schedule import Time


def weights(
    log_r: Float[Tensor, "..."], rho: float, freeze: float | None = None, gamma_w: float = 0.0
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(e, n): how much of the predicted noise and of fresh noise a step from t to s holds, as shares of sigma_s.

    Args:
        log_r: log(kappa_s / kappa_t), float64; below 0 for a step towards the picture, minus infinity where
            alpha_t = 0 or sigma_s = 0; infinity where alpha_s = 0.
        rho: amount of fresh noise, >= 0.
        freeze: gamma. (1 + rho^2) eps is written gamma (y - x0) / kappa + (1 + rho^2 - gamma) eps, with x0 held fixed
            in the first term and eps in the second. None is 1 + rho^2, where x0 alone is fixed: then e^2 + n^2 = 1, so
            that the noise level is right at any step size.
        gamma_w: kappa^gamma_w eps is held fixed instead of eps in the deterministic part.

    With phi(x) = (exp(x) - 1) / x, which has no special place at gamma = 1:
    e = 1 + rho^2 log(r) phi((gamma - 1) log r) and n^2 = -2 rho^2 log(r) phi(2 (gamma - 1) log r).
    At r = 0 only the limit for x0 fixed is finite; it is taken for all gamma. Without fresh noise e = 1 where r is
    infinite too.
    """
    gamma = 1 + rho**2 if freeze is None else freeze
    end = torch.isneginf(log_r) if rho else torch.isinf(log_r)
    # exp(log_r) underflows long before -1e4; a finite number keeps 0 times infinity out.
    log_r = log_r.clamp(min=-1e4)
    if not rho:
        e, n2 = torch.ones_like(log_r), torch.zeros_like(log_r)
    elif freeze is None:
        e, n2 = torch.exp(rho**2 * log_r), -torch.expm1(2 * rho**2 * log_r)
    else:
        e = 1 + rho**2 * log_r * _phi((gamma - 1) * log_r)
        n2 = -2 * rho**2 * log_r * _phi(2 * (gamma - 1) * log_r)
    if gamma_w:
        e = e + torch.exp(-log_r) * log_r * (_phi((1 - gamma_w) * log_r) - _phi(log_r))
    limit = (0.0, 1.0) if rho else (1.0, 0.0)
    return torch.where(end, limit[0], e), torch.where(end, limit[1], n2.clamp(min=0).sqrt())


def _phi(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x, 1 at 0."""
    return torch.where(x == 0, 1.0, torch.expm1(x) / torch.where(x == 0, 1.0, x))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What `S2N` and its scheduler share: how much noise a step draws, and what it holds fixed."""

    rho: NotNegative = 0.5
    """Fresh noise: 0 none (few steps), 1 as much as DDPM, more is allowed; 0.3 to 1 for 50 steps and more."""
    freeze: float | None = None
    """What is held fixed along a step: 0 the predicted noise, 1 + rho^2 (the default) the predicted picture."""
    gamma_w: float = 0.0
    """Longer (below 0) or shorter (above 0) deterministic steps; useful values are of order 0.01 to 0.1."""
    delta: Share | None = None
    """Share of each step's noise that is fresh, in [0, 1], whatever the step size; takes the place of rho."""
    order: Literal[1, 2] = 1
    """2 extrapolates the predicted picture from the last two steps."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def noisy(self) -> bool:
        """Whether sampling draws noise."""
        return bool(self.rho if self.delta is None else self.delta)

    def coefficients(
        self, process: GaussianProcess, t: Time, s: Time, like: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, std) such that the step from t to s is a z_t + b x0 + std xi, elementwise in the basis; float64.

        Finite at alpha_t = 0 and at sigma_s = 0, and without fresh noise at alpha_s = 0; where s = t the step is the
        identity.
        """
        log_alpha_t, log_sigma_t = process.log_alpha_sigma(t, like)
        log_alpha_s, log_sigma_s = process.log_alpha_sigma(s, like)
        logsnr_t, logsnr_s = log_alpha_t - log_sigma_t, log_alpha_s - log_sigma_s
        same = logsnr_t == logsnr_s
        log_r = torch.where(same, 0.0, logsnr_t - logsnr_s)
        if self.delta is None:
            e, n = weights(log_r, self.rho, self.freeze, self.gamma_w)
        else:
            e, n = (torch.full_like(log_r, x) for x in (math.sqrt(1 - self.delta**2), self.delta))
        a = torch.where(same, 1.0, torch.exp(log_sigma_s - log_sigma_t) * e)
        # As alpha_s (1 - r e), but without r, which is infinite at alpha_s = 0.
        b = torch.where(same, 0.0, torch.exp(log_alpha_s) - torch.exp(log_alpha_t + log_sigma_s - log_sigma_t) * e)
        return a, b, torch.where(same, 0.0, torch.exp(log_sigma_s) * n)
