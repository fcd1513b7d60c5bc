"""Sampling from consistency models: one call, or a few with fresh noise between them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from ..noise.denoiser import Denoiser
from .samplers import Callback, Generators, Times, _report, _steps, draw, predict


def consistency(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *dims"],
    times: Times,
    cond: Any = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    middle: float | None = None,
) -> Float[Tensor, "batch *dims"]:
    """Multistep consistency sampling (arXiv:2303.01469, algorithm 1): jump to the clean end, add noise, jump again.

    The denoiser's x0 at time t is taken for a sample at the cleanest time ``times[-1]``, and noise brings it to the
    next time s by the forward process: with alpha = 1, x + sqrt(sigma_s^2 - sigma_min^2) z'. The last answer is
    returned as it is. One network call a step; only the steps between draw noise.

    Args:
        middle: with two steps, the time in (0, 1) at which the second begins, in place of ``times[1]``.

    Raises:
        BadInput: times that increase, a ``middle`` outside (0, 1), no generator where noise is drawn.
    """
    if middle is not None and not 0 < middle < 1:
        raise BadInput(f"middle must lie between 0 and 1, got {middle}")
    if middle is not None and len(times) == 3:
        times = torch.stack([times[0], torch.full_like(times[1], middle), times[2]])
    if not (times.diff(dim=0) <= 0).all():
        raise BadInput("consistency sampling runs from noise (1) to clean (0): the times must decrease")
    for step, t, s in _steps(times):
        z = predict(denoiser, z, t, cond)
        if step < len(times) - 2:
            alpha, var = denoiser.process.transition(times[-1], s, z)
            z = denoiser.process.sample(alpha * z, var, draw(z, generator))
        _report(callback, step, s, z)
    return z
