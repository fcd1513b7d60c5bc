"""Denoisers made from denoisers: guidance and clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..noise.denoiser import Denoiser
from ..noise.process import GaussianProcess, Prediction, pad_right
from ..noise.schedule import Time, float64


@dataclass(frozen=True, eq=False)
class Guided:
    """Classifier-free guidance: uncond + scale * (cond - uncond), within an interval of noise levels.

    arXiv:2207.12598 in the convention where scale 1 is the conditional model (bit for bit, and one network
    call) and 0 the unconditional one. ``interval`` = (low, high), both included, limits guidance to those
    times, or to those log-SNRs with ``measure="logsnr"`` (arXiv:2404.07724); outside it the conditional
    prediction is returned, for one network call. Where both are needed and the two conditionings can be
    joined (tensors, or a type with ``cat``) they go through the network as one batch. A conditioning given
    to the call takes the place of ``cond``. A condition that says what lies `between` it and ``uncond`` is guided in
    steps, each with a scale of its own (arXiv:2211.09800, eq. 3). ``rescale`` makes of the guided and the conditional
    prediction the one that is returned.
    """

    denoiser: Denoiser
    cond: Any
    uncond: Any
    scale: float
    interval: tuple[float, float] | None = None
    measure: Literal["t", "logsnr"] = "t"
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def process(self) -> GaussianProcess:
        return self.denoiser.process

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    def __call__(self, z: Float[Tensor, "batch *dims"], t: Time, cond: Any = None) -> Tensor:
        return self.beside(z, t, cond)[0]

    def beside(self, z: Float[Tensor, "batch *dims"], t: Time, cond: Any = None) -> tuple[Tensor, Tensor]:
        """What the call gives, and the conditional prediction, which is known then."""
        cond = self.cond if cond is None else cond
        inside = self._inside(t)
        guides = cond.guided_at(self.scale) if hasattr(cond, "guided_at") else self.scale != 1
        if not guides or not inside.any():
            plain = self.denoiser(z, t, cond)
            return plain, plain
        steps = cond.between(self.uncond) if hasattr(cond, "between") else ()
        with_cond, without, *passed = self.each(z, t, [cond, self.uncond, *(step for step, _ in steps)])
        guided = lower = without
        for (_, scale), pred in zip(steps, passed, strict=True):
            guided, lower = guided + pad_right(scale, z.ndim).to(z) * (pred - lower), pred
        guided = guided + self.scale * (with_cond - lower)
        guided = guided if self.rescale is None else self.rescale(guided, with_cond)
        if inside.all():
            return guided, with_cond
        return torch.where(pad_right(inside, z.ndim).to(z.device), guided, with_cond), with_cond

    def _inside(self, t: Time) -> Tensor:
        level = float64(t) if self.measure == "t" else self.process.schedule.logsnr(t)
        if self.interval is None:
            return torch.ones_like(level, dtype=torch.bool)
        low, high = self.interval
        return (level >= low) & (level <= high)

    def each(self, z: Tensor, t: Time, conds: Sequence[Any]) -> list[Tensor]:
        """The prediction for every one of these, of which the first is the conditional one, at once where possible."""
        first, n = conds[0], len(conds)
        join = torch.cat if torch.is_tensor(first) else getattr(type(first), "cat", None)
        alike = join is not None and all(type(c) is type(first) for c in conds)
        if alike and hasattr(first, "as_half"):  # so that who looks inside the network can tell them apart
            conds = [c.as_half(i == 0) for i, c in enumerate(conds)]
        if not alike or not all(len(c) == len(z) for c in conds):
            return [self.denoiser(z, t, c) for c in conds]
        if torch.is_tensor(t) and t.ndim and t.shape[0] == len(z):
            t = torch.cat([t] * n)
        return list(self.denoiser(torch.cat([z] * n), t, join(list(conds))).chunk(n))


@dataclass(frozen=True, eq=False)
class Clipped:
    """A denoiser whose x0 is held to data within [low, high], as the process says (`GaussianProcess.clamp`).

    For models of pixels, whose range is known.
    """

    denoiser: Denoiser
    low: float = -1.0
    high: float = 1.0
    prediction: Prediction = "x0"

    @property
    def process(self) -> GaussianProcess:
        return self.denoiser.process

    def __call__(self, z: Float[Tensor, "batch *dims"], t: Time, cond: Any = None) -> Tensor:
        pred = self.denoiser(z, t, cond)
        x0 = self.process.convert(pred, z, t, self.denoiser.prediction, "x0")
        x0 = self.process.clamp(x0, self.low, self.high)
        return self.process.convert(x0, z, t, "x0", self.prediction)
