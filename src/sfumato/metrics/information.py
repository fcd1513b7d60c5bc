"""How much a noisy picture says about the clean one: mmse and mutual information along a schedule, from a model's loss.

A noisy picture is a Gaussian channel: z / sigma = sqrt(SNR) x + eps. With mmse(SNR) = E||x - E[x | z]||^2,

    dI(x; z) / dSNR = mmse / 2 (cs/0412108, theorem 2),  so  dI / dlogsnr = SNR mmse / 2 = E||eps - E[eps | z]||^2 / 2,

in nats, summed over dimensions: the loss of a noise predictor is twice the information gained per unit of log-SNR, and
the diffusion term of the variational bound is the difference of I between the ends (arXiv:2107.00630,
arXiv:2408.04221). A trained model is not the conditional mean, so its curves are bounds: its mmse lies above the true
one, and so does the information that it is charged for.

Where the log-SNR depends on the frequency, each element of the process's basis is a channel of its own; the sums are
over channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.finite import NotFinite
from sfumato.noise import Denoiser
from sfumato.progress import track

from .bootstrap import Estimate, mean_interval


def gaussian_mmse(snr: Float[Tensor, "..."], variance: float) -> Float[Tensor, "..."]:
    """mmse of x ~ N(0, variance), per dimension: variance / (1 + variance SNR)."""
    return variance / (1 + variance * snr)


def gaussian_information(snr: Float[Tensor, "..."], variance: float) -> Float[Tensor, "..."]:
    """I(x; z) of x ~ N(0, variance) in nats, per dimension: log(1 + variance SNR) / 2, the most of any x."""
    return torch.log1p(variance * snr) / 2


@dataclass(frozen=True, eq=False)
class InformationCurve:
    """What `measure` found at each time, from noise to clean, for each item; all float64.

    Attributes:
        times: in [0, 1], decreasing.
        logsnr: of the schedule.
        noise_error: ||eps - eps_hat||^2.
        picture_error: ||x - x_hat||^2, whose mean is the mmse.
        information: nats gained since the first time, never decreasing.
        dimensions: of one item.
    """

    times: Float[Tensor, "point"]
    logsnr: Float[Tensor, "point"]
    noise_error: Float[Tensor, "point item"]
    picture_error: Float[Tensor, "point item"]
    information: Float[Tensor, "point item"]
    dimensions: int

    def mmse(self, seed: int = 0) -> list[Estimate]:
        """Mean squared error of the predicted picture at each time, per dimension, with 95 % intervals over items."""
        return self._estimates(self.picture_error / self.dimensions, seed)

    def bits(self, seed: int = 0) -> list[Estimate]:
        """Mutual information at each time in bits per dimension, with 95 % intervals over items."""
        return self._estimates(self.information / (self.dimensions * math.log(2)), seed)

    @staticmethod
    def _estimates(values: Tensor, seed: int) -> list[Estimate]:
        rng = torch.Generator().manual_seed(seed)
        return [mean_interval(row, rng, resamples=2000) for row in values]


@torch.no_grad()
def measure(
    denoiser: Denoiser,
    x: Float[Tensor, "item *dims"],
    times: Float[Tensor, "point"],
    generator: torch.Generator,
    cond: Any = None,
    batch: int = 64,
    progress: bool = False,
) -> InformationCurve:
    """The denoiser's errors on data ``x`` at each of ``times``, and the information they stand for.

    The integral over log-SNR is the trapezoidal rule between neighbouring times, so ``times`` should be close enough
    that the error changes little from one to the next (`sfumato.sample.times.logsnr` with 20 or more steps).

    Args:
        x: clean data as the denoiser knows them (pixels in [-1, 1], or scaled latents).
        times: decreasing in [0, 1]; the log-SNRs must be finite.
        generator: a CPU generator, the only source of noise.
        cond: one row for each item, or None.

    Raises:
        BadInput: times that do not decrease, or where the log-SNR is infinite; data or predictions that are not finite.
    """
    process = denoiser.process
    logsnr = process.schedule.logsnr(times)
    if times.ndim != 1 or len(times) < 2 or (times.diff() >= 0).any() or not torch.isfinite(logsnr).all():
        raise BadInput("information needs at least two times, decreasing from noise (1), with finite log-SNR")
    parts: list[list[Tensor]] = [[], [], []]
    for start in track(range(0, len(x), batch), "measuring", progress):
        rows = slice(start, start + batch)
        found = _errors(denoiser, x[rows], times, generator, None if cond is None else cond[rows])
        for part, values in zip(parts, found, strict=True):
            part.append(values)
    noise, picture, information = (torch.cat(part, dim=1) for part in parts)
    return InformationCurve(times.double(), logsnr, noise, picture, information, x[0].numel())


def _errors(
    denoiser: Denoiser, x: Tensor, times: Tensor, generator: torch.Generator, cond: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors of noise and picture, and the information gained so far, [point, item] each."""
    process, n = denoiser.process, len(x)
    noise, picture, gained = [], [], [torch.zeros(n, dtype=torch.float64)]
    before = level_before = None
    for t in times:
        eps = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        z = process.diffuse(x, t, eps)
        guess = process.convert(denoiser(z, t, cond), z, t, denoiser.prediction, "eps")
        error = process.to_basis(guess - eps).double().square().cpu()
        level = process.logsnr(t, x).cpu()
        noise.append(error.flatten(1).sum(1))
        picture.append((error * torch.exp(-level)).flatten(1).sum(1))
        if before is not None:
            gained.append((error + before).mul(level - level_before).flatten(1).sum(1) / 4)
        before, level_before = error, level
    found = torch.stack(noise)
    if not bool(torch.isfinite(found).all()):
        point, item = (int(i) for i in (~torch.isfinite(found)).nonzero()[0])
        raise NotFinite(f"the model's error is not finite at time {float(times[point]):.3g} for picture {item} of a "
                        "batch: nothing can be measured with it")  # fmt: skip
    return found, torch.stack(picture), torch.stack(gained).cumsum(0)
