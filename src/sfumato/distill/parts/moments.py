"""Moment matching (arXiv:2406.04103): its draws and its losses.

A student's clean prediction x~ at (z_t, t) and a z_s that follows from it; the moments match where, for every z_s, the
mean of x~ is the teacher's prediction. Norms and inner products are sums over a picture.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.noise import GaussianProcess
from sfumato.train.draw import uniform

from .segments import v_weight

Weight = Literal["v", "snr", "edm", "flat"]


def draw_pair_of_times(
    n: int, steps: int, rng: torch.Generator, smallest: float = 1e-3
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(t, s) in float64: s uniform in [0, 1], at least ``smallest``, t = min(s + delta, 1), delta up to 1 / steps."""
    s, delta = uniform(n, rng).double().clamp_min(smallest), uniform(n, rng).double() / steps
    return (s + delta).clamp_max(1.0), s


def next_state(
    process: GaussianProcess,
    z: Float[Tensor, "batch *dims"],
    x0: Float[Tensor, "batch *dims"],
    t: Float[Tensor, "batch"],
    s: Float[Tensor, "batch"],
    noise: Float[Tensor, "batch *dims"],
) -> Float[Tensor, "batch *dims"]:
    """z_s ~ q(z_s | z_t, x0), without gradient. Given both: x0 noised afresh would lose variety (section 3)."""
    with torch.no_grad():
        return process.sample(*process.posterior(z, x0, t, s), noise)


def loss_weight(process: GaussianProcess, s: Float[Tensor, "batch"], kind: Weight) -> Float[Tensor, "batch"]:
    """w(s), in float64: SNR + 1 ("v"), SNR ("snr"), SNR + 1 / 0.5^2 ("edm", data of standard deviation 0.5), or 1."""
    if kind == "v":
        return v_weight(process, s)
    snr = process.schedule.logsnr(s).exp()
    return {"snr": snr, "edm": snr + 4, "flat": torch.ones_like(snr)}[kind]


def auxiliary_loss(
    x: Float[Tensor, "batch *dims"],
    auxiliary: Float[Tensor, "batch *dims"],
    teacher: Float[Tensor, "batch *dims"],
    weight: Float[Tensor, "batch"],
) -> Float[Tensor, "batch"]:
    """w(s) (||x~ - g_phi(z_s)||^2 + ||g_phi(z_s) - g_theta(z_s)||^2), with a gradient for ``auxiliary`` only.

    Its minimiser is (E[x~ | z_s] + g_theta(z_s)) / 2 (algorithm 2, even iterations).
    """
    away, back = auxiliary - x.detach(), auxiliary - teacher.detach()
    return weight * (away.square() + back.square()).flatten(1).sum(1)


def student_loss(
    x: Float[Tensor, "batch *dims"],
    auxiliary: Float[Tensor, "batch *dims"],
    teacher: Float[Tensor, "batch *dims"],
    weight: Float[Tensor, "batch"],
) -> Float[Tensor, "batch"]:
    """w(s) <x~, g_phi(z_s) - g_theta(z_s)>, with a gradient for x~ only (algorithm 2, odd iterations).

    Its value means nothing; its gradient in x~ is w(s) times half the gap of the moments, for the best auxiliary.
    """
    return weight * (x * (auxiliary - teacher).detach()).flatten(1).sum(1)


def teacher_loss(
    x: Float[Tensor, "batch *dims"], teacher: Float[Tensor, "batch *dims"], weight: Float[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """w(s) ||x~ - g_theta(z_s)||^2, the teacher's loss on what the student makes, with no gradient for x~."""
    return weight * (x.detach() - teacher).square().flatten(1).sum(1)


def instant_loss(
    x: Float[Tensor, "batch *dims"], change: Float[Tensor, "batch *dims"], weight: Float[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """-w(s) <x~, J_theta(z_s) nu>: `student_loss` with an auxiliary that is a small step phi = theta - nu away."""
    return -weight * (x * change.detach()).flatten(1).sum(1)
