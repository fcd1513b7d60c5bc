"""Noise schedules: log-SNR as a function of continuous time.

A schedule is a strictly decreasing map from time t in [0, 1] (0 = clean, 1 = noise) to the log
signal-to-noise ratio ``lambda(t) = log(alpha_t^2 / sigma_t^2)``. What alpha and sigma are separately is the
path's business: variance preserving (``"vp"``), variance exploding (``"ve"``) or straight (``"flow"``);
each schedule names the path it is published with, and `sfumato.noise.process.GaussianProcess` applies it.

Times and log-SNRs may be Python numbers or tensors of any shape; the answer has the same shape and is always
float64, because tan and exp lose every digit of the end points in float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from ..errors import BadInput

Path = Literal["vp", "ve", "flow"]
Time = float | Float[Tensor, "..."]


def float64(t: Time) -> Float[Tensor, "..."]:
    """``t`` as a float64 tensor, on its own device if that has float64 (Apple's has not)."""
    if not torch.is_tensor(t):
        return torch.tensor(float(t), dtype=torch.float64)
    return (t.cpu() if t.device.type == "mps" else t).to(torch.float64)


def bisect(
    function: Callable[[Tensor], Tensor], value: Tensor, low: float = 0.0, high: float = 1.0
) -> Float[Tensor, "..."]:
    """Where a decreasing ``function`` of [low, high] takes ``value``; the nearest end if nowhere."""
    low, high = torch.full_like(value, low), torch.full_like(value, high)
    for _ in range(60):
        middle = (low + high) / 2
        above = function(middle) > value
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Schedule(ABC):
    """A decreasing log-SNR. Subclasses give `logsnr`, and the other two where a closed form exists."""

    @property
    def path(self) -> Path:
        """How alpha and sigma follow from the log-SNR."""
        return "vp"

    @abstractmethod
    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        """log(alpha^2 / sigma^2) at time t in [0, 1]."""

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        """d logsnr / dt at time t, a negative number."""
        t = float64(t).detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.logsnr(t).sum(), t)[0]

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        """The time in [0, 1] at which the log-SNR takes the given value (the inverse of `logsnr`)."""
        return bisect(self.logsnr, float64(logsnr))

    def level(self, t: Time) -> Float[Tensor, "..."]:
        """What a network is told of time t: the log-SNR, unless that does not tell times apart."""
        return self.logsnr(t)


@dataclass(frozen=True)
class Cosine(Schedule):
    """The cosine schedule with bounded ends: alpha = cos(theta), sigma = sin(theta), theta linear in t.

    lambda(t) = -2 log tan(a + t (b - a)), a = arctan(exp(-logsnr_max / 2)), b = arctan(exp(-logsnr_min /
    2)), so that lambda(0) = logsnr_max and lambda(1) = logsnr_min (arXiv:2301.11093, appendix). Infinite
    bounds give the ideal -2 log tan(pi t / 2).
    """

    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self) -> None:
        if not self.logsnr_min < self.logsnr_max:
            raise BadInput(f"logsnr_min ({self.logsnr_min}) must be below logsnr_max ({self.logsnr_max})")

    @property
    def _angles(self) -> tuple[float, float]:
        return math.atan(math.exp(-self.logsnr_max / 2)), math.atan(math.exp(-self.logsnr_min / 2))

    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        a, b = self._angles
        return -2 * torch.log(torch.tan(a + float64(t) * (b - a)))

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        a, b = self._angles
        return -4 * (b - a) / torch.sin(2 * (a + float64(t) * (b - a)))

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        a, b = self._angles
        return (torch.atan(torch.exp(-float64(logsnr) / 2)) - a) / (b - a)


@dataclass(frozen=True)
class _BetaSchedule(Schedule):
    """Variance preserving with log(alpha^2) = -B(t), B the integral of the noise rate beta over [0, t]."""

    beta_start: float
    beta_end: float
    train_steps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.beta_start < self.beta_end:
            raise BadInput(
                f"beta_start ({self.beta_start}) must lie between 0 and beta_end ({self.beta_end})"
            )

    @abstractmethod
    def _integral(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """B(t) and its derivative beta(t)."""

    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        return -torch.log(torch.expm1(self._integral(float64(t))[0]))

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        integral, beta = self._integral(float64(t))
        return beta / torch.expm1(-integral)


@dataclass(frozen=True)
class LinearBeta(_BetaSchedule):
    """Noise rate linear in time: the VP-SDE (arXiv:2011.13456), DDPM's table for many small steps.

    ``beta_start`` and ``beta_end`` are the per-step numbers that diffusers uses, ``train_steps`` the number
    of steps they belong to, so beta(t) runs from train_steps * beta_start to train_steps * beta_end.
    logsnr(0) is infinite.
    """

    beta_start: float = 0.0001
    beta_end: float = 0.02

    def _integral(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.beta_end - self.beta_start
        beta = self.beta_start + slope * t
        return self.train_steps * (self.beta_start * t + slope * t**2 / 2), self.train_steps * beta

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        integral = softplus(-float64(logsnr), threshold=40) / self.train_steps
        root = torch.sqrt(self.beta_start**2 + 2 * (self.beta_end - self.beta_start) * integral)
        return 2 * integral / (self.beta_start + root)

    def discrete(self) -> DiscreteSchedule:
        """The table diffusers calls ``linear``, computed in float32 as there: the same numbers."""
        return _from_betas(torch.linspace(self.beta_start, self.beta_end, self.train_steps))


@dataclass(frozen=True)
class ScaledLinearBeta(_BetaSchedule):
    """Square root of the noise rate linear in time: Stable Diffusion's; fields as in `LinearBeta`."""

    beta_start: float = 0.00085
    beta_end: float = 0.012

    @property
    def _roots(self) -> tuple[float, float]:
        return math.sqrt(self.beta_start), math.sqrt(self.beta_end) - math.sqrt(self.beta_start)

    def _integral(self, t: Tensor) -> tuple[Tensor, Tensor]:
        root, slope = self._roots
        # (root + slope t)^3 - root^3 over 3 slope, multiplied out so that nothing cancels at small t.
        integral = t * (root**2 + root * slope * t + slope**2 * t**2 / 3)
        return self.train_steps * integral, self.train_steps * (root + slope * t) ** 2

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        root, slope = self._roots
        step = 3 * slope * softplus(-float64(logsnr), threshold=40) / self.train_steps
        end = (root**3 + step) ** (1 / 3)
        return step / (slope * (end**2 + end * root + root**2))

    def discrete(self) -> DiscreteSchedule:
        """The table diffusers calls ``scaled_linear``, computed in float32 as there: the same numbers."""
        return _from_betas(torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps) ** 2)


@dataclass(frozen=True)
class DiscreteSchedule(Schedule):
    """The schedule of a checkpoint trained on T discrete timesteps, made continuous.

    Timestep i = 0 ... T-1 is time (i + 1) / T, where the log-SNR is the table's; between timesteps it is
    linear in t. On [0, 1/T] the noise rate is taken as constant, as DDPM's first step has it: the log-SNR
    rises to infinity at t = 0, where z = x0 exactly. A table that ends at zero SNR has log-SNR minus
    infinity after its last but one step.
    """

    table: tuple[float, ...] = field(repr=False)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Float[Tensor, "steps"]) -> DiscreteSchedule:
        """From diffusers' ``scheduler.alphas_cumprod``: decreasing alpha^2 within [0, 1)."""
        alphas = float64(alphas_cumprod.detach().cpu())
        decreasing = alphas.ndim == 1 and len(alphas) > 1 and bool((alphas.diff() < 0).all())
        if not decreasing or not (alphas[0] < 1 and alphas[-1] >= 0):
            raise BadInput("alphas_cumprod must be one strictly decreasing row of numbers in [0, 1)")
        return cls(tuple(torch.logit(alphas).tolist()))

    @property
    def train_steps(self) -> int:
        return len(self.table)

    def _segments(self, like: Tensor) -> tuple[Tensor, Tensor, float]:
        """Log-SNR at the timesteps, its rise to the next one, and B at the first (see `_BetaSchedule`)."""
        knots = torch.tensor(self.table, dtype=torch.float64, device=like.device)
        return knots, knots.diff(), math.log1p(math.exp(-self.table[0]))

    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        t = float64(t)
        knots, rises, first = self._segments(t)
        position = t * len(knots) - 1
        # (i + 1) / T in float32 must still be timestep i; next to zero SNR the difference is infinite.
        position = torch.where((position - position.round()).abs() < 1e-4, position.round(), position)
        left = position.floor().clamp(0, len(rises) - 1).long()
        fraction = position - left
        inside = knots[left] + torch.where(fraction == 0, 0.0, fraction * rises[left])
        inside = torch.where(fraction == 1, knots[left + 1], inside)
        return torch.where(
            position >= 0, inside, -torch.log(torch.expm1(first * (position + 1).clamp(min=0)))
        )

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        t = float64(t)
        knots, rises, first = self._segments(t)
        steps = len(knots)
        left = (t * steps - 1 + 1e-9).floor().clamp(0, steps - 2).long()
        start = steps * first / torch.expm1(-first * steps * t)
        return torch.where(t * steps >= 1 - 1e-9, steps * rises[left], start)

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        value = float64(logsnr)
        knots, rises, first = self._segments(value)
        left = torch.searchsorted(-knots, -value.contiguous()).clamp(1, len(rises)) - 1
        start = softplus(-value, threshold=40) / first
        fraction = (value - knots[left]) / rises[left]
        return torch.where(value > knots[0], start, (left + 1 + fraction).clamp(max=len(knots))) / len(knots)


def _from_betas(betas: Float[Tensor, "steps"]) -> DiscreteSchedule:
    return DiscreteSchedule.from_alphas_cumprod(torch.cumprod(1 - betas, dim=0))


@dataclass(frozen=True)
class Karras(Schedule):
    """EDM's noise levels: alpha = 1, sigma^(1/rho) linear in time (arXiv:2206.00364, eq. 5).

    Time 0 is ``sigma_min``, time 1 ``sigma_max``. A negative ``rho`` is allowed (arXiv:2506.20024 uses -10).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    path = "ve"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max or self.rho == 0:
            raise BadInput(
                f"need 0 < sigma_min < sigma_max, rho not 0; got {self.sigma_min, self.sigma_max, self.rho}"
            )

    @property
    def _roots(self) -> tuple[float, float]:
        start = self.sigma_min ** (1 / self.rho)
        return start, self.sigma_max ** (1 / self.rho) - start

    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        start, slope = self._roots
        return -2 * self.rho * torch.log(start + slope * float64(t))

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        start, slope = self._roots
        return -2 * self.rho * slope / (start + slope * float64(t))

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        start, slope = self._roots
        return (torch.exp(-float64(logsnr) / (2 * self.rho)) - start) / slope


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """Straight paths: alpha = 1 - sigma, sigma = t when ``shift`` is 1 (arXiv:2209.03003).

    ``shift`` m > 1 gives more noise, sigma = m t / (1 + (m - 1) t), which is -2 log m in log-SNR; SD3 uses 3
    (arXiv:2403.03206, eq. 23). Both ends are infinite: time 0 is the picture, time 1 pure noise.
    """

    shift: float = 1.0
    path = "flow"

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise BadInput(f"shift must be positive, got {self.shift}")

    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        t = float64(t)
        return 2 * (torch.log1p(-t) - torch.log(t) - math.log(self.shift))

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        t = float64(t)
        return -2 / (t * (1 - t))

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        return torch.sigmoid(-float64(logsnr) / 2 - math.log(self.shift))
