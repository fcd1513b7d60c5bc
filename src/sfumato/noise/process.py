"""The Gaussian process that turns pictures into noise, and everything that follows from it in closed form.

z_t = alpha_t x0 + sigma_t eps, with x0 the picture and eps standard normal.

Broadcast rule, the same everywhere: a time is a number or a tensor whose dimensions line up with the *first*
dimensions of ``z``; it is padded with ones on the right, then broadcast. For z of shape [batch, channel,
height, width] a time may be a number, [batch] (one per picture) or [batch, 1, height, width] (per element);
for z of shape [batch, frame, channel, height, width] also [batch, frame] or [1, frame].

All formulas act elementwise in an orthonormal basis that `GaussianProcess.to_basis` chooses. Here it is the
pixels themselves. A process whose alpha depends on the frequency overrides `log_alpha_sigma`, `to_basis`
and `from_basis` (an orthonormal cosine transform and its inverse), and inherits all the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..errors import BadInput
from .schedule import Path, Schedule, Time

Prediction = Literal["eps", "v", "x0", "score", "flow"]


def pad_right(t: Float[Tensor, "..."], ndim: int) -> Float[Tensor, "..."]:
    """``t`` with ones appended to its shape until it has ``ndim`` dimensions (the broadcast rule above)."""
    if t.ndim > ndim:
        raise BadInput(f"a time of shape {tuple(t.shape)} has more dimensions than its data ({ndim})")
    return t.reshape(t.shape + (1,) * (ndim - t.ndim)) if t.ndim else t


@dataclass(frozen=True)
class GaussianProcess:
    """Marginals, posteriors and conversions of z_t = alpha_t x0 + sigma_t eps.

    ``path`` says how alpha and sigma follow from the log-SNR lambda: ``"vp"`` alpha^2 + sigma^2 = 1, ``"ve"``
    alpha = 1, ``"flow"`` alpha + sigma = 1. Left out, it is the schedule's own. Coefficients are computed
    in float64 and cast to the type of ``z`` last, so float16 data lose nothing to the schedule.
    """

    schedule: Schedule
    path: Path | None = None

    def log_alpha_sigma(self, t: Time, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log(alpha_t) and log(sigma_t) in float64, broadcastable against ``like`` if it is given."""
        logsnr = self.schedule.logsnr(t)
        if like is not None:
            logsnr = pad_right(logsnr, like.ndim)
        path = self.path or self.schedule.path
        if path == "vp":
            return logsigmoid(logsnr) / 2, logsigmoid(-logsnr) / 2
        if path == "flow":
            return logsigmoid(logsnr / 2), logsigmoid(-logsnr / 2)
        return torch.zeros_like(logsnr), -logsnr / 2

    def to_basis(self, x: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        """``x`` in the orthonormal basis in which the process acts elementwise."""
        return x

    def from_basis(self, u: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        """The inverse of `to_basis`."""
        return u

    def clamp(self, x: Float[Tensor, "batch *dims"], low: float, high: float) -> Float[Tensor, "batch *dims"]:
        """``x`` held, elementwise in the basis, to what data within [low, high] can be."""
        return x.clamp(low, high)

    def alpha_sigma(self, t: Time, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t: float64 shaped like ``t``, or to broadcast against ``like`` in its type."""
        log_alpha, log_sigma = self.log_alpha_sigma(t, like)
        return _cast(log_alpha.exp(), like), _cast(log_sigma.exp(), like)

    def logsnr(self, t: Time, like: Tensor | None = None) -> Float[Tensor, "..."]:
        """log(alpha_t^2 / sigma_t^2) in float64."""
        log_alpha, log_sigma = self.log_alpha_sigma(t, like)
        return 2 * (log_alpha - log_sigma)

    def diffuse(
        self, x0: Float[Tensor, "batch *dims"], t: Time, eps: Float[Tensor, "batch *dims"]
    ) -> Float[Tensor, "batch *dims"]:
        """alpha_t x0 + sigma_t eps: a draw from q(z_t | x0) when ``eps`` is standard normal."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return self.from_basis(alpha * self.to_basis(x0) + sigma * self.to_basis(eps))

    def convert(
        self,
        pred: Float[Tensor, "batch *dims"],
        z: Float[Tensor, "batch *dims"],
        t: Time,
        source: Prediction,
        target: Prediction,
    ) -> Float[Tensor, "batch *dims"]:
        """A prediction of kind ``source`` at (z, t), as one of kind ``target``.

        - ``"eps"``: the noise; ``"x0"``: the picture;
        - ``"v"``: alpha eps - sigma x0 (arXiv:2202.00512; used unchanged where alpha^2 + sigma^2 is not 1);
        - ``"score"``: the gradient of log p(z_t), -eps / sigma;
        - ``"flow"``: eps - x0, what SD3 and Flux predict: dz/dt when alpha = 1 - t and sigma = t.

        Where alpha is 0, eps and score do not determine x0, and where sigma is 0, x0 does not determine
        eps: those results are not finite.
        """
        for kind in (source, target):
            if kind not in get_args(Prediction):
                raise BadInput(f"unknown prediction {kind!r}: use one of {', '.join(get_args(Prediction))}")
        if source == target:
            return pred
        alpha, sigma = self.alpha_sigma(t, z)
        x0, eps = decompose(self.to_basis(pred), self.to_basis(z), alpha, sigma, source)
        return self.from_basis(compose(x0, eps, alpha, sigma, target))

    def split(
        self, pred: Float[Tensor, "batch *dims"], z: Float[Tensor, "batch *dims"], t: Time, source: Prediction
    ) -> tuple[Tensor, Tensor]:
        """The pair (x0, eps) that a prediction of kind ``source`` stands for; alpha x0 + sigma eps = z."""
        alpha, sigma = self.alpha_sigma(t, z)
        x0, eps = decompose(self.to_basis(pred), self.to_basis(z), alpha, sigma, source)
        return self.from_basis(x0), self.from_basis(eps)

    def coefficients(
        self, t: Time, s: Time, like: Tensor | None = None, eta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, var) such that the step from t to s is N(a z_t + b x0, var), elementwise in the basis.

        With r = exp((lambda_t - lambda_s) / 2) and c = 1 - r^2: var = eta^2 sigma_s^2 c,
        a = (sigma_s / sigma_t) sqrt(1 - eta^2 c), b = alpha_s (1 - r sqrt(1 - eta^2 c))
        (arXiv:2010.02502, eq. 7 and 16). For every eta in [0, 1] the marginals of z_s stay exact; eta = 1 is
        the posterior of the Markov process, eta = 0 deterministic (DDIM), also with s > t.
        Finite at alpha_t = 0 and at sigma_s = 0, and with eta = 0 at alpha_s = 0, where a = sigma_s / sigma_t and
        b = -alpha_t a; where s = t the step is the identity. From sigma_t = 0 to noise there is no step: the picture
        does not say which noise.
        """
        if not 0 <= eta <= 1:
            raise BadInput(f"eta must lie in [0, 1], got {eta}")
        log_alpha_t, log_sigma_t = self.log_alpha_sigma(t, like)
        log_alpha_s, log_sigma_s = self.log_alpha_sigma(s, like)
        logsnr_t, logsnr_s = log_alpha_t - log_sigma_t, log_alpha_s - log_sigma_s
        same = logsnr_t == logsnr_s
        log_r = torch.where(same, 0.0, logsnr_t - logsnr_s)
        # 1 - eta^2 c = (1 - eta^2) + eta^2 r^2, summed as logarithms: exact at eta = 0 and at eta = 1.
        log_keep = torch.zeros_like(log_r)
        if eta:
            log_keep = torch.logaddexp(torch.full_like(log_r, _log(1 - eta**2)), 2 * (_log(eta) + log_r)) / 2
        a = torch.where(same, 1.0, torch.exp(log_sigma_s - log_sigma_t + log_keep))
        b = -log_alpha_s.exp() * torch.expm1(log_r + log_keep)
        b = torch.where(torch.isposinf(log_r), log_alpha_s.exp() - log_alpha_t.exp() * a, b)
        var = -(eta**2) * torch.exp(2 * log_sigma_s) * torch.expm1(2 * log_r)
        b, var = torch.where(same, 0.0, b), torch.where(same | (eta == 0), 0.0, var)
        return _cast(a, like), _cast(b, like), _cast(var, like)

    def posterior(
        self,
        z: Float[Tensor, "batch *dims"],
        x0: Float[Tensor, "batch *dims"],
        t: Time,
        s: Time,
        eta: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z_s | z_t, x0), s <= t; with ``eta`` < 1 of its less noisy relatives.

        The variance is elementwise in the basis, and broadcasts; draw with `sample`.
        """
        a, b, var = self.coefficients(t, s, z, eta)
        return self.from_basis(a * self.to_basis(z) + b * self.to_basis(x0)), var

    def implied_x0(
        self, z: Float[Tensor, "batch *dims"], z_s: Float[Tensor, "batch *dims"], t: Time, s: Time
    ) -> Float[Tensor, "batch *dims"]:
        """The x0 with which the deterministic step from z at t lands on ``z_s`` (arXiv:2403.06807, eq. 5).

        Undefined where s = t; ill-conditioned for s close to t, where float64 tensors are advisable.
        """
        a, b, _ = self.coefficients(t, s, z, eta=0.0)
        return self.from_basis((self.to_basis(z_s) - a * self.to_basis(z)) / b)

    def sample(
        self,
        mean: Float[Tensor, "batch *dims"],
        var: Float[Tensor, "..."],
        noise: Float[Tensor, "batch *dims"],
    ) -> Float[Tensor, "batch *dims"]:
        """mean + sqrt(var) noise, for a mean and variance from `posterior` and standard normal ``noise``."""
        return mean + self.from_basis(var.sqrt() * self.to_basis(noise))

    def transition(self, s: Time, t: Time, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(alpha_ts, var_ts) of q(z_t | z_s) = N(alpha_ts z_s, var_ts), s <= t, elementwise in the basis."""
        log_alpha_t, log_sigma_t = self.log_alpha_sigma(t, like)
        log_alpha_s, log_sigma_s = self.log_alpha_sigma(s, like)
        logsnr_t, logsnr_s = log_alpha_t - log_sigma_t, log_alpha_s - log_sigma_s
        same = logsnr_t == logsnr_s
        alpha = torch.where(same, 1.0, torch.exp(log_alpha_t - log_alpha_s))
        var = -torch.exp(2 * log_sigma_t) * torch.expm1(2 * (logsnr_t - logsnr_s))
        var = torch.where(same, 0.0, var)
        return _cast(alpha, like), _cast(var, like)


def _cast(coefficient: Tensor, like: Tensor | None) -> Tensor:
    return coefficient if like is None else coefficient.to(like)


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -math.inf


def decompose(
    pred: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, source: Prediction
) -> tuple[Tensor, Tensor]:
    """(x0, eps) from a prediction of kind ``source``; elementwise, the formulas of
    `GaussianProcess.convert`."""
    if source == "v":
        norm = alpha**2 + sigma**2
        return (alpha * z - sigma * pred) / norm, (sigma * z + alpha * pred) / norm
    if source == "flow":
        norm = alpha + sigma
        return (z - sigma * pred) / norm, (z + alpha * pred) / norm
    if source == "x0":
        return pred, (z - alpha * pred) / sigma
    eps = pred if source == "eps" else -sigma * pred
    return (z - sigma * eps) / alpha, eps


def compose(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, target: Prediction) -> Tensor:
    """The prediction of kind ``target`` that (x0, eps) stand for: the inverse of `decompose`."""
    if target == "v":
        return alpha * eps - sigma * x0
    if target == "flow":
        return eps - x0
    if target == "score":
        return -eps / sigma
    return x0 if target == "x0" else eps
