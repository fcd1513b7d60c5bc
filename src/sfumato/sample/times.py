"""Time grids: which times a sampler visits, from noise (1) to clean (0), both ends included."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from ..noise.schedule import Schedule


def uniform(steps: int, start: float = 1.0, end: float = 0.0) -> Float[Tensor, "steps+1"]:
    """Equal steps in t."""
    if steps < 1:
        raise BadInput(f"a sampler needs at least one step, got {steps}")
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def logsnr(schedule: Schedule, steps: int, start: float = 1.0, end: float = 0.0) -> Float[Tensor, "steps+1"]:
    """Equal steps in log-SNR between the times ``start`` and ``end``, whose log-SNR must be finite."""
    low, high = _finite_ends(schedule, start, end)
    return _exact_ends(schedule.time(low + (high - low) * uniform(steps, 0.0, 1.0)), start, end)


def karras(
    schedule: Schedule, steps: int, start: float = 1.0, end: float = 0.0, rho: float = 7.0
) -> Float[Tensor, "steps+1"]:
    """Equal steps in (sigma / alpha)^(1 / rho): EDM's grid (arXiv:2206.00364, eq. 5) for any schedule.

    EDM appends a last step to sigma = 0; where the schedule reaches it, append it to the answer.
    """
    low, high = (math.exp(-x / (2 * rho)) for x in _finite_ends(schedule, start, end))
    root = low + (high - low) * uniform(steps, 0.0, 1.0)
    return _exact_ends(schedule.time(-2 * rho * torch.log(root)), start, end)


def information(
    schedule: Schedule,
    levels: Float[Tensor, "point"],
    gained: Float[Tensor, "point"],
    steps: int,
    start: float = 1.0,
    end: float = 0.0,
) -> Float[Tensor, "steps+1"]:
    """Equal steps in mutual information: many where the picture takes shape, few where little is decided.

    ``gained`` is the information, in any unit, at the log-SNRs ``levels``, both increasing, as
    `sfumato.metrics.information` measures it; in between it is linear. Beyond these log-SNRs nothing is gained.
    """
    levels, gained = levels.double().cpu(), gained.double().cpu()
    if levels.ndim != 1 or levels.shape != gained.shape or (levels.diff() <= 0).any() or (gained.diff() < 0).any():
        raise BadInput("a curve of information needs increasing log-SNRs, and information that does not decrease")
    low, high = (np.interp(x, levels, gained) for x in _finite_ends(schedule, start, end))
    if not high > low:
        raise BadInput(f"no information is gained between t = {start} and t = {end}")
    found = np.interp(low + (high - low) * uniform(steps, 0.0, 1.0), gained, levels)
    return _exact_ends(schedule.time(torch.from_numpy(found)), start, end)


def _finite_ends(schedule: Schedule, start: float, end: float) -> tuple[float, float]:
    ends = schedule.logsnr(start).item(), schedule.logsnr(end).item()
    for time, value in zip((start, end), ends, strict=True):
        if not math.isfinite(value):
            raise BadInput(f"the log-SNR at t = {time} is {value}: choose a time strictly between 0 and 1")
    return ends


def _exact_ends(times: Tensor, start: float, end: float) -> Tensor:
    times[0], times[-1] = start, end
    return times
