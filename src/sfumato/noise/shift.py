"""Schedules made from schedules: moved with the resolution, interpolated between two moves, clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from .schedule import Path, Schedule, Time, float64


@dataclass(frozen=True)
class Shifted(Schedule):
    """A schedule moved by 2 log(noise_size / size): side ``size`` gets the noise that suits ``noise_size``.

    Averaging a picture of side d down to side s multiplies its SNR by (d/s)^2, so the shift makes the SNR
    seen at ``noise_size`` that of the base schedule (arXiv:2301.11093). ``noise_size < size`` means more
    noise. The end points move along, unless ``keep_bounds``: then the base's bounds are moved the other way
    first, so that the end points stay where the base has them (k-diffusion's habit); only bases with
    ``logsnr_min`` and ``logsnr_max`` allow it.
    """

    base: Schedule
    noise_size: float
    size: float
    keep_bounds: bool = False

    def __post_init__(self) -> None:
        if min(self.noise_size, self.size) <= 0:
            raise BadInput(f"noise_size ({self.noise_size}) and size ({self.size}) must be positive")
        if self.keep_bounds and not hasattr(self.base, "logsnr_min"):
            raise BadInput(
                f"keep_bounds needs a base schedule with bounds; {type(self.base).__name__} has none"
            )

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def shift(self) -> float:
        return 2 * math.log(self.noise_size / self.size)

    @property
    def _base(self) -> Schedule:
        if not self.keep_bounds:
            return self.base
        bounded: Any = self.base
        low, high = bounded.logsnr_min - self.shift, bounded.logsnr_max - self.shift
        return replace(bounded, logsnr_min=low, logsnr_max=high)

    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        return self._base.logsnr(t) + self.shift

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        return self._base.dlogsnr_dt(t)

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        return self._base.time(float64(logsnr) - self.shift)


@dataclass(frozen=True)
class Interpolated(Schedule):
    """Between two shifts, for side ``size``: t * (shifted to ``low``) + (1 - t) * (shifted to ``high``).

    Noisy times obey the small size, clean ones the large (arXiv:2301.11093). The base's bounds apply before
    the shift, so the end points move; to shift first and bound last (arXiv:2403.06807) wrap an unbounded
    one in `Bounded`: ``Bounded(Interpolated(Cosine(-inf, inf), 32, 128, 128), -15, 15)``. ``keep_bounds``
    interpolates between two `Shifted` that keep theirs, so that the end points are the base's.
    """

    base: Schedule
    low: float
    high: float
    size: float
    keep_bounds: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high or self.size <= 0:
            raise BadInput(f"sizes must be positive and low ({self.low}) at most high ({self.high})")
        if self.keep_bounds:
            Shifted(self.base, self.low, self.size, True)  # refuses a base without bounds

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def _ends(self) -> tuple[Schedule, Schedule]:
        return Shifted(self.base, self.low, self.size, True), Shifted(self.base, self.high, self.size, True)

    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        t = float64(t)
        if self.keep_bounds:
            low, high = self._ends
            return t * low.logsnr(t) + (1 - t) * high.logsnr(t)
        # One sum instead of two shifted schedules, which an unbounded base would make 0 times infinity.
        shift = t * math.log(self.low / self.size) + (1 - t) * math.log(self.high / self.size)
        return self.base.logsnr(t) + 2 * shift

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        if self.keep_bounds:
            t, (low, high) = float64(t), self._ends
            slopes = t * low.dlogsnr_dt(t) + (1 - t) * high.dlogsnr_dt(t)
            return slopes + low.logsnr(t) - high.logsnr(t)
        return self.base.dlogsnr_dt(t) + 2 * math.log(self.low / self.high)


@dataclass(frozen=True)
class Bounded(Schedule):
    """A schedule clipped to [logsnr_min, logsnr_max]: constant, with slope 0, where the base lies outside."""

    base: Schedule
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    @property
    def path(self) -> Path:
        return self.base.path

    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        return self.base.logsnr(t).clamp(self.logsnr_min, self.logsnr_max)

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        logsnr = self.base.logsnr(t)
        inside = (logsnr > self.logsnr_min) & (logsnr < self.logsnr_max)
        return torch.where(inside, self.base.dlogsnr_dt(t), 0.0)

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        return self.base.time(float64(logsnr).clamp(self.logsnr_min, self.logsnr_max))
