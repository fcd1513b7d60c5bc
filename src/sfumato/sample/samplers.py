"""Samplers, all with one signature: ``sampler(denoiser, z, times, cond, generator=..., callback=...)``.

``z`` is the noisy start at ``times[0]`` and the answer is z at ``times[-1]``. Grids come from
`sfumato.sample.times`. A grid may also carry a time per picture, frame or element: its first dimension
counts the steps, and each row broadcasts against z by the rule of `sfumato.noise.process`; an element whose
time stands still is not touched. ``callback(step, time, z)`` is called after every step. All processes work,
isotropic or not, and so does float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from ..noise.addim import addim_step, posterior_variance
from ..noise.denoiser import Denoiser
from ..noise.process import GaussianProcess, Prediction
from ..noise.schedule import Time

Times = Float[Tensor, "steps+1 *broadcast"]
Callback = Callable[[int, Tensor, Tensor], None]
Generators: TypeAlias = torch.Generator | list[torch.Generator]
Variance: TypeAlias = Callable[[Time], Float[Tensor, "..."]]


def predict(denoiser: Denoiser, z: Tensor, t: Tensor | float, cond: Any, kind: Prediction = "x0") -> Tensor:
    """The denoiser's prediction at (z, t), converted to ``kind``."""
    return denoiser.process.convert(denoiser(z, t, cond), z, t, denoiser.prediction, kind)


def draw(like: Float[Tensor, "batch *dims"], generator: Generators | None) -> Float[Tensor, "batch *dims"]:
    """Standard normal noise shaped like ``like``, drawn where the generator lives; a list holds one per
    picture."""
    if generator is None:
        raise BadInput("this sampler draws noise: pass generator=torch.Generator().manual_seed(...)")
    if isinstance(generator, list):
        if len(generator) != len(like):
            raise BadInput(f"{len(generator)} generators for {len(like)} pictures: give one each")
        return torch.cat([draw(row[None], g) for row, g in zip(like, generator, strict=True)])
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
    return noise.to(like.device)


def require_noise(process: GaussianProcess, times: Times) -> None:
    """Refuse a step away from a picture without any noise, of which a prediction of the picture says nothing.

    Raises:
        BadInput: times that increase where sigma is 0.
    """
    if (torch.isposinf(process.schedule.logsnr(times[:-1])) & (times.diff(dim=0) > 0)).any():
        raise BadInput(
            "no step leads from a picture without any noise back to noise: use "
            "sfumato.sample.inversion.invert, or begin a little above time 0"
        )


def ddim(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *dims"],
    times: Times,
    cond: Any = None,
    eta: float = 0.0,
    generator: Generators | None = None,
    callback: Callback | None = None,
    final_noise: bool = True,
    variance: float = 0.0,
) -> Float[Tensor, "batch *dims"]:
    """DDIM (arXiv:2010.02502, eq. 12) with ``eta`` in [0, 1]: 0 is deterministic, 1 is `ddpm`. First order.

    With eta = 0 the times may also increase, which inverts a picture into its noise. ``final_noise=False``
    returns the mean of the last step instead of a draw; ``variance``: see `ddpm`.

    Raises:
        BadInput: times that increase with eta > 0, or from a picture without any noise.
    """
    process = denoiser.process
    if eta and (times.diff(dim=0) > 0).any():
        raise BadInput("with eta > 0 the times must decrease from noise (1) to clean (0)")
    require_noise(process, times)
    for step, t, s in _steps(times):
        mean, var = process.posterior(z, predict(denoiser, z, t, cond), t, s, eta)
        if variance:
            var = widened(process, var, z, t, s, variance)
        noisy = eta > 0 and (final_noise or step < len(times) - 2)
        z = process.sample(mean, var, draw(z, generator)) if noisy else mean
        _report(callback, step, s, z)
    return z


def addim(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *dims"],
    times: Times,
    cond: Any = None,
    eta: float = 0.1,
    variance: Variance | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "batch *dims"]:
    """aDDIM (arXiv:2403.06807, algorithm 3): `ddim` without its loss of variance. First order, deterministic.

    The truth is taken to spread around the prediction with variance ``eta`` * ``variance(t)``. Without a function,
    ``variance`` is the paper's analytic rule, which belongs to ``eta`` = 0.1; with the measured error of the denoiser
    (`prediction_error`) the paper takes 0.75. ``eta`` = 0 is `ddim`. Draws nothing: ``generator`` is ignored.

    Raises:
        BadInput: a negative ``eta``; times that increase.
    """
    if eta < 0:
        raise BadInput(f"eta must not be negative, got {eta}")
    if (times.diff(dim=0) > 0).any():
        raise BadInput("aDDIM runs from noise (1) to clean (0): the times must decrease")
    process = denoiser.process
    for step, t, s in _steps(times):
        var = posterior_variance(process, t) if variance is None else variance(t)
        z = addim_step(process, z, predict(denoiser, z, t, cond), t, s, eta * var)
        _report(callback, step, s, z)
    return z


@torch.no_grad()
def prediction_error(
    denoiser: Denoiser,
    x0: Float[Tensor, "batch *dims"],
    times: Float[Tensor, "times"],
    generator: torch.Generator,
    cond: Any = None,
) -> Float[Tensor, "times"]:
    """Mean squared error of the denoiser's x0 in each dimension at each time, over the clean data ``x0``."""
    errors = []
    for t in times:
        z = denoiser.process.diffuse(x0, t, draw(x0, generator))
        errors.append((predict(denoiser, z, t, cond) - x0).double().square().mean())
    return torch.stack(errors)


def ddpm(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *dims"],
    times: Times,
    cond: Any = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    final_noise: bool = True,
    variance: float = 0.0,
) -> Float[Tensor, "batch *dims"]:
    """Ancestral sampling from q(z_s | z_t, x0) with x0 predicted (arXiv:2006.11239): `ddim` with eta = 1.

    ``variance`` in [0, 1] moves the logarithm of the step's variance from the posterior's, sigma_s^2 c, towards the
    forward step's, sigma_t^2 c, with c = 1 - exp(lambda_t - lambda_s) (arXiv:2102.09672, eq. 15, with one number).
    """
    return ddim(denoiser, z, times, cond, 1.0, generator, callback, final_noise, variance)


def widened(process: GaussianProcess, var: Tensor, z: Tensor, t: Tensor, s: Tensor, share: float) -> Tensor:
    """``var`` of a step from t to s times (sigma_t / sigma_s)^(2 share); 0 stays 0."""
    if not 0 <= share <= 1:
        raise BadInput(f"variance must lie in [0, 1], got {share}")
    log_ratio = process.log_alpha_sigma(t, z)[1] - process.log_alpha_sigma(s, z)[1]
    return torch.where(var > 0, var * torch.exp(2 * share * log_ratio).to(z), var)


def heun(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *dims"],
    times: Times,
    cond: Any = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "batch *dims"]:
    """The trapezoidal rule for dz = x0 dalpha + eps dsigma; second order, two network calls a step.

    The predictor is the DDIM step. With alpha = 1 this is EDM's Heun sampler (arXiv:2206.00364, algorithm
    1), on straight paths Heun's rule for the velocity; in this form it needs no derivative of the schedule.
    Like EDM's, the last step is not corrected where it ends without noise. Draws nothing: ``generator`` is
    ignored.
    """
    process = denoiser.process
    for step, t, s in _steps(times):
        x0, eps = process.split(denoiser(z, t, cond), z, t, denoiser.prediction)
        end = process.diffuse(x0, s, eps)
        if not torch.isinf(process.logsnr(s)).any():
            x0_end, eps_end = process.split(denoiser(end, s, cond), end, s, denoiser.prediction)
            x0, eps = (x0 + x0_end) / 2, (eps + eps_end) / 2
            end = z + process.diffuse(x0, s, eps) - process.diffuse(x0, t, eps)
        z = end
        _report(callback, step, s, z)
    return z


def dpmpp_2m(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *dims"],
    times: Times,
    cond: Any = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "batch *dims"]:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2): second order with one network call a step.

    A DDIM step from x0 extrapolated linearly in log-SNR to the middle of the step. The first and the last
    step are first order, as are steps that begin or end at infinite log-SNR. diffusers has the same rule for
    tables of timesteps in float32 (see `sfumato.sample.scheduler`); this one takes any process, grid and
    precision. Draws nothing: ``generator`` is ignored.
    """
    process = denoiser.process
    require_noise(process, times)
    before = before_t = None
    for step, t, s in _steps(times):
        x0 = ahead = predict(denoiser, z, t, cond)
        if before is not None and step < len(times) - 2:
            ahead = extrapolated(process, x0, before, t, before_t, s)
        z, _ = process.posterior(z, ahead, t, s, eta=0.0)
        before, before_t = x0, t
        _report(callback, step, s, z)
    return z


def extrapolated(
    process: GaussianProcess, x0: Tensor, before: Tensor, t: Tensor, before_t: Tensor, s: Tensor
) -> Tensor:
    """x0 at t and ``before`` at before_t, extrapolated linearly in log-SNR to the middle of the step from t to s.

    x0 itself where a log-SNR is infinite or stands still.
    """
    now = process.logsnr(t, x0)
    ratio = (process.logsnr(s, x0) - now) / (now - process.logsnr(before_t, x0)) / 2
    weight = torch.where(torch.isfinite(ratio), ratio, 0.0).to(x0)
    return x0 + process.from_basis(weight * process.to_basis(x0 - before))


def _steps(times: Times) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number, from, to) of every step of a grid."""
    if len(times) < 2:
        raise BadInput(f"a grid needs at least two times, got {len(times)}")
    return ((step, t, s) for step, (t, s) in enumerate(pairwise(times)))


def _report(callback: Callback | None, step: int, time: Tensor, z: Tensor) -> None:
    """Call the callback, if there is one."""
    if callback is not None:
        callback(step, time, z)
