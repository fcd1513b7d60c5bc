"""Rectified flow (arXiv:2209.03003) as InstaFlow uses it: losses, Euler's rule, straightness.

In this file time runs as in the papers: t = 0 is noise X0, t = 1 the picture X1, and a velocity is dX/dt = X1 - X0.
Elsewhere in the package t = 1 is noise, and a flow is eps - x0: `velocity` translates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.noise import Denoiser
from sfumato.sample import predict

Velocity = Callable[[Tensor, Tensor | float], Tensor]
Reduction = Literal["mean", "halfsum"]


def velocity(denoiser: Denoiser, cond: Any = None) -> Velocity:
    """v(Z, t | cond) of a denoiser, which is asked at 1 - t: exactly 1 at the noise."""
    return lambda z, t: -predict(denoiser, z, 1 - t, cond, "flow")


def between(
    x0: Float[Tensor, "batch *dims"], x1: Float[Tensor, "batch *dims"], t: Float[Tensor, "batch"]
) -> Float[Tensor, "batch *dims"]:
    """X_t = t X1 + (1 - t) X0."""
    t = t.to(x0).reshape(-1, *[1] * (x0.ndim - 1))
    return t * x1 + (1 - t) * x0


def reflow_loss(
    v: Float[Tensor, "batch *dims"],
    x0: Float[Tensor, "batch *dims"],
    x1: Float[Tensor, "batch *dims"],
    reduction: Reduction = "mean",
) -> Float[Tensor, "batch"]:
    """||(X1 - X0) - v||^2 of each pair: the mean over its elements, or half their sum ("halfsum")."""
    error = (x1 - x0 - v).square().flatten(1)
    return error.mean(1) if reduction == "mean" else error.sum(1) / 2


def one_step(v: Velocity, x0: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
    """X0 + v(X0, 0): what a distilled flow draws."""
    return x0 + v(x0, 0.0)


def euler(v: Velocity, x0: Float[Tensor, "batch *dims"], steps: int) -> Float[Tensor, "batch *dims"]:
    """The flow's end by Euler's rule in equal steps, from the noise X0."""
    for i in range(steps):
        x0 = x0 + v(x0, i / steps) / steps
    return x0


def straightness(v: Velocity, x0: Float[Tensor, "batch *dims"], steps: int = 25) -> Float[Tensor, "batch"]:
    """S = integral of ||(Z1 - Z0) - v(Z_t, t)||^2 dt of each path, by Euler's rule; 0 only where it is straight.

    The norm is a sum over all dimensions. Memory: the velocities of all steps.
    """
    z, speeds = x0, []
    for i in range(steps):
        speeds.append(v(z, i / steps))
        z = z + speeds[-1] / steps
    return torch.stack([(z - x0 - speed).square().flatten(1).sum(1) for speed in speeds]).mean(0)
