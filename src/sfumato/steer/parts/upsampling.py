"""Upsample guidance as a `Denoiser`: the term of arXiv:2404.01709 for any process, prediction and sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.noise import Denoiser, DiscreteSchedule, GaussianProcess
from sfumato.noise.process import Prediction, compose, decompose, pad_right
from sfumato.noise.schedule import Path, Time, float64

from .resolutions import matched_logsnr, nearest_step, pooled, repeated, rescaling, spread

Tau = Literal["grid", "exact"]
Part = Literal["nothing", "time", "power", "factor"]
Ask = Callable[[Tensor, Tensor], Tensor]


def upsample_guidance(
    eps: Float[Tensor, "batch *dims"], eps_small: Float[Tensor, "batch *smaller"], factors: tuple[int, ...]
) -> Float[Tensor, "batch *dims"]:
    """u = U[eps_small / s - D[eps]] of arXiv:2404.01709; s is the root of the number of elements in a block.

    Args:
        eps: the noise predicted at full size, at time t.
        eps_small: the noise predicted of the rescaled block means, at time tau.
        factors: sides of the blocks, (height, width) or (frame, height, width).
    """
    return repeated(eps_small / spread(factors) - pooled(eps, factors), factors)


def guidance_weight(t: Time, theta: float, eta: float, steps: int | None = None) -> Float[Tensor, "..."]:
    """w = theta H(t - (1 - eta) T) with H(0) = 0: guided is the noisy share ``eta``; with eta = 1 every time.

    Args:
        t: time in [0, 1].
        steps: T of a model that was trained on T timesteps, whose timestep i is time (i + 1) / T; None where time is
            continuous, and T = 1.
    """
    t = float64(t)
    position = t if steps is None else (t * steps - 1) / steps
    guided = torch.ones_like(t, dtype=torch.bool) if eta == 1 else position > 1 - eta + 1e-7
    return theta * guided.double()


@dataclass(frozen=True, eq=False)
class Upsampled:
    """A denoiser of pictures (or frames) some whole number of times larger than those that ``denoiser`` learnt.

    Algorithm of arXiv:2404.01709, in the form for any x_t = alpha x0 + sigma eps: the block means D[x_t], rescaled to
    what the model knows, are denoised at the time tau with lambda(tau) = lambda(t) + 2 log s, and the guidance
    w u (`upsample_guidance`) is added to the noise predicted at full size. With w = 1 the block means of the predicted
    noise are those of the small picture's, and what lies within the blocks stays.

    u is computed in float64, and is given in the model's own kind of prediction. Where alpha is 0 the noise says
    nothing of x0, and its limit is taken: the block means of x0 are replaced by the small picture's x0.

    Attributes:
        denoiser: under a process that is the same for all frequencies.
        factors: sides of the blocks, (height, width) or (frame, height, width).
        theta: weight of the guidance; 0 is ``denoiser`` itself.
        eta: the noisy share of the times that is guided.
        tau: for a model trained on a table of timesteps, the nearest of them ("grid"), or between two ("exact").
        without: a part to leave out, for comparison: the shift of "time", the rescaling to unit "power", or the
            "factor" 1 / s of the small picture's noise.
        late: guide also at times so late that no time is clean enough to match, with the cleanest as tau.
        small: what the small picture's denoiser is told in place of the condition.
    """

    denoiser: Denoiser
    factors: tuple[int, ...]
    theta: float = 1.0
    eta: float = 1.0
    tau: Tau = "grid"
    without: Part = "nothing"
    late: bool = True
    small: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if type(self.process) is not GaussianProcess:
            raise BadInput(
                f"upsample guidance needs one noise level for all frequencies, which a {type(self.process).__name__} "
                "has not: use a model of an ordinary Gaussian process"
            )

    @property
    def process(self) -> GaussianProcess:
        return self.denoiser.process

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    def __call__(self, z: Float[Tensor, "batch *dims"], t: Time, cond: Any = None) -> Tensor:
        small = cond if self.small is None else self.small(cond)
        return self.guided(self.denoiser(z, t, cond), z, t, lambda low, tau: self.denoiser(low, tau, small))

    def weight(self, t: Time) -> Float[Tensor, "..."]:
        """How strong the guidance is at time t, in float64."""
        schedule = self.process.schedule
        steps = schedule.train_steps if isinstance(schedule, DiscreteSchedule) else None
        weight = guidance_weight(t, self.theta, self.eta, steps)
        return weight if self.late else torch.where(self._target(t) > self._cleanest, 0.0, weight)

    def matched(self, t: Time) -> Float[Tensor, "..."]:
        """tau: the time at which a whole picture is as noisy as the block means are at time t, in float64."""
        t, target, schedule = float64(t), self._target(t), self.process.schedule
        if self.without == "time":
            return t
        if isinstance(schedule, DiscreteSchedule) and self.tau == "grid":
            table = torch.tensor(schedule.table, dtype=torch.float64, device=t.device)
            return (nearest_step(table, target) + 1).double() / schedule.train_steps
        tau = schedule.time(target.clamp(max=self._cleanest)).clamp(0, 1)
        return torch.where(target == -torch.inf, t, tau)

    def guided(
        self, pred: Float[Tensor, "batch *dims"], z: Float[Tensor, "batch *dims"], t: Time, ask: Ask
    ) -> Float[Tensor, "batch *dims"]:
        """The prediction ``pred`` for ``z`` at time t with the guidance in it, of its kind and type.

        Args:
            t: one time, one a row, or for frames [batch or 1, frame].
            ask: the model's prediction for smaller pictures at their time, called once, or not at all where nothing
                is guided.

        Raises:
            BadInput: a side that is no multiple of its factor; frames of one block at several times.
        """
        weight, s = self.weight(t), spread(self.factors)
        if s == 1 or not weight.any():
            return pred
        double = z.dtype if z.device.type == "mps" else torch.float64
        wide = z.to(double)
        means, time = pooled(wide, self.factors), self._coarse(float64(t), wide)
        alpha, sigma = self.process.alpha_sigma(time, means)
        tau = self.matched(time)
        low = means if self.without == "power" else means * rescaling(alpha, sigma, s, self._path)
        told = ask(low.to(z.dtype), tau).to(double)
        x0_small, eps_small = decompose(told, low, *self.process.alpha_sigma(tau, low), self.prediction)
        alpha, sigma = self.process.alpha_sigma(t, wide)
        x0, eps = decompose(pred.to(double), wide, alpha, sigma, self.prediction)
        factor = s if self.without == "factor" else 1.0
        u = upsample_guidance(eps, factor * eps_small, self.factors)
        x0_shift = u
        if self.prediction not in ("eps", "score"):
            limit = repeated(x0_small - pooled(x0, self.factors), self.factors)
            x0_shift = torch.where(alpha == 0, limit, -(sigma / alpha) * u)
            u = torch.where(alpha == 0, 0.0, u)
        shift = compose(x0_shift, u, alpha, sigma, self.prediction) * pad_right(weight, z.ndim).to(wide)
        # Without noise there is nothing to guide, and x0 does not determine eps.
        return pred + torch.where((sigma == 0) | (pad_right(weight, z.ndim).to(wide) == 0), 0.0, shift).to(pred.dtype)

    @property
    def _path(self) -> Path:
        return self.process.path or self.process.schedule.path

    @property
    def _cleanest(self) -> float:
        """The log-SNR of the least noise that the model was trained on."""
        schedule = self.process.schedule
        return schedule.table[0] if isinstance(schedule, DiscreteSchedule) else float(schedule.logsnr(0.0))

    def _target(self, t: Time) -> Float[Tensor, "..."]:
        return matched_logsnr(self.process.logsnr(t), spread(self.factors))

    def _coarse(self, t: Float[Tensor, "..."], z: Float[Tensor, "batch *dims"]) -> Float[Tensor, "..."]:
        """The times of the block means."""
        frames = self.factors[0] if len(self.factors) == 3 else 1
        if t.ndim > max(1, z.ndim - 3) and t[(..., *[0] * (t.ndim - max(1, z.ndim - 3)))].numel() != t.numel():
            raise BadInput("upsample guidance needs one time for each picture or frame, not one for each element")
        if t.ndim < 2 or t.shape[1] == 1 or frames == 1:
            return t
        coarse = t[:, ::frames]
        if not torch.equal(coarse.repeat_interleave(frames, dim=1), t):
            raise BadInput(
                f"frames that are averaged {frames} at a time must be equally noisy: draw them block by block "
                '(schedule="standard"), or leave the frames as many as they are'
            )
        return coarse
