"""DDIM as many public samplers have it: x0 is held to the data's range, the noise is left as it was predicted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..noise.denoiser import Denoiser
from .samplers import Callback, Generators, Times


def held_ddim(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *dims"],
    times: Times,
    cond: Any = None,
    low: float = -1.0,
    high: float = 1.0,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "batch *dims"]:
    """z_s = alpha_s clip(x0) + sigma_s eps, with x0 and eps of one prediction; at clean data the clipped x0.

    This is diffusers' ``DDIMScheduler`` with ``clip_sample``. `ddim` of a `Clipped` denoiser computes the noise anew
    from the clipped x0, so that alpha x0 + sigma eps = z goes on to hold; here it does not where something is clipped.
    Give a denoiser that does not clip by itself. Deterministic: ``generator`` is ignored.
    """
    process = denoiser.process
    for step, (t, s) in enumerate(pairwise(times)):
        x0, eps = process.split(denoiser(z, t, cond), z, t, denoiser.prediction)
        z = process.diffuse(process.clamp(x0, low, high), s, eps)
        if callback is not None:
            callback(step, s, z)
    return z
