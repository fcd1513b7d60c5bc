"""Consistency inside segments of time: the mathematics of multistep consistency models (arXiv:2403.06807).

[0, 1] is cut into S equal segments. From any point of a segment the network predicts, through one DDIM step, the
segment's start (its clean end). One segment is a consistency model, infinitely many are a diffusion model.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.noise import GaussianProcess
from sfumato.train.draw import integers

Per = Literal["picture", "element"]


def ramp(step: int, length: int) -> float:
    """How far step ``step`` is through ``length`` steps, in [0, 1]; 1 where there is nothing to go through."""
    return min(max(step / length, 0.0), 1.0) if length > 0 else 1.0


def teacher_steps(progress: float, first: float = 64, last: float = 1280) -> float:
    """N_teacher, log-linear from ``first`` to ``last`` (section 3.2): few steps spread news fast, many err little."""
    return math.exp(math.log(first) + progress * (math.log(last) - math.log(first)))


def draw_times(
    n: int, segments: int, substeps: int, rng: torch.Generator
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(t, s, start) in float64 for ``n`` pictures: a uniform segment, a uniform one of its ``substeps`` teacher steps.

    s is one teacher step 1 / (segments * substeps) below t, and ``start`` the start of their segment: start <= s < t,
    all of them multiples of the teacher step, so that s = start holds exactly where it should.
    """
    segment, inside = integers(segments, n, rng), 1 + integers(substeps, n, rng)
    t, total = segment * substeps + inside, float(segments * substeps)
    return t.double() / total, (t - 1).double() / total, (segment * substeps).double() / total


def consistency_target(
    process: GaussianProcess,
    z: Float[Tensor, "batch *dims"],
    z_s: Float[Tensor, "batch *dims"],
    x0_s: Float[Tensor, "batch *dims"],
    t: Float[Tensor, "batch"],
    s: Float[Tensor, "batch"],
    start: Float[Tensor, "batch"],
) -> Float[Tensor, "batch *dims"]:
    """The x0 that, by DDIM from (z, t), reaches the segment's start where x0_s reaches it from (z_s, s).

    Equations 4 and 5: invDDIM_{t -> start}(DDIM_{s -> start}(x0_s, z_s), z). Where s = start, z_s itself is the start
    and ``x0_s`` plays no part, which pins the solution. Give float64: the inverse divides by what is small for t near
    ``start``.
    """
    end, _ = process.posterior(z_s, x0_s, s, start, eta=0.0)
    return process.implied_x0(z, end, t, start)


def pseudo_huber(
    difference: Float[Tensor, "batch *dims"], epsilon: float, per: Per = "picture"
) -> Float[Tensor, "batch"]:
    """sqrt(||difference||^2 + epsilon^2) - epsilon of each picture, over its whole vector.

    ``per`` = "element" takes it of each number and averages: the paper's un-squared norm suggests the vector and does
    not say. Small ``epsilon`` is the norm, large the squared norm over 2 epsilon.
    """
    flat = difference.flatten(1)
    if per == "picture":
        return (flat.square().sum(1) + epsilon**2).sqrt() - epsilon
    return ((flat.square() + epsilon**2).sqrt() - epsilon).mean(1)


def v_weight(process: GaussianProcess, t: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """SNR(t) + 1, in float64: an error of x0 as the error of v that it is."""
    return process.schedule.logsnr(t).exp() + 1
