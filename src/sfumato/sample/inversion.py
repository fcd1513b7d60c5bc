"""From a clean sample back to the noise it comes from."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from ..noise.denoiser import Denoiser


def invert(
    denoiser: Denoiser, z: Float[Tensor, "batch *dims"], times: Float[Tensor, "steps+1"], cond: Any = None
) -> Float[Tensor, "batch *dims"]:
    """DDIM inversion, from ``z`` at ``times[0]`` (it may be without noise) to the noisier ``times[-1]``; first order.

    As is usual, a step from t to s takes the network's eps at (z_t, s), the end of the step: there a draw that comes
    back will ask for it (arXiv:2211.09794, `DDIMInverseScheduler` of diffusers). A network that predicts a flow gives
    its velocity at (z_t, s) instead, which makes the step Euler's.

    Raises:
        BadInput: times that do not increase.
    """
    if len(times) < 2 or (times.diff() <= 0).any():
        raise BadInput("an inversion runs from clean (0) to noise (1): the times must increase")
    process, kind = denoiser.process, denoiser.prediction
    for t, s in pairwise(times):
        pred = denoiser(z, s, cond)
        if kind != "flow":
            pred = process.convert(pred, z, s, kind, "eps")
        x0, eps = process.split(pred, z, t, "flow" if kind == "flow" else "eps")
        z = process.diffuse(x0, s, eps)
    return z
