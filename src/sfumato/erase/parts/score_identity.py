"""Score identity distillation into one step, with the teacher and the fake score told different things.

Pure functions of tensors and denoisers (arXiv:2404.04057; arXiv:2409.11219). alpha_t and sigma_t are the process's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.noise import DiscreteSchedule, GaussianProcess
from sfumato.noise.denoiser import Denoiser
from sfumato.sample import predict


def time_of(process: GaussianProcess, sigma: float) -> float:
    """The time in [0, 1] at which sigma_t / alpha_t is ``sigma``; under a table of alphas, the nearest timestep's.

    So 2.5 is timestep 625 of Stable Diffusion's table and 440 of DDPM's.
    """
    schedule = process.schedule
    t = float(schedule.time(-2 * math.log(sigma)))
    if isinstance(schedule, DiscreteSchedule):
        return min(max(round(t * schedule.train_steps), 1), schedule.train_steps) / schedule.train_steps
    return t


def sigmas_of(process: GaussianProcess) -> tuple[float, float]:
    """The least and the greatest sigma_t / alpha_t that `time_of` can find."""
    schedule = process.schedule
    first = 1 / schedule.train_steps if isinstance(schedule, DiscreteSchedule) else 0.0
    low, high = ((-schedule.logsnr(t) / 2).exp() for t in (first, 1.0))
    return float(low), float(high)


def times_between(
    process: GaussianProcess, low: float, high: float, uniform: Float[Tensor, "n"]
) -> Float[Tensor, "n"]:
    """Times uniform in [low, high], of numbers uniform in [0, 1); under a table of alphas, timesteps, ends included.

    Float64, on the device of ``uniform``.
    """
    u, schedule = uniform.double(), process.schedule
    if not isinstance(schedule, DiscreteSchedule):
        return low + u * (high - low)
    first, last = (round(t * schedule.train_steps) for t in (low, high))
    return (first + (u * (last - first + 1)).floor()) / schedule.train_steps


def generated(
    generator: Denoiser, noise: Float[Tensor, "batch *dims"], t: float, cond: Any = None
) -> Float[Tensor, "batch *dims"]:
    """What the one-step generator draws: its x0 for sigma_t times the ``noise``, at the one time ``t`` it knows."""
    z = generator.process.diffuse(torch.zeros_like(noise), t, noise)
    return predict(generator, z, t, cond)


def fake_score_loss(
    fake: Denoiser,
    x: Float[Tensor, "batch *dims"],
    t: Float[Tensor, "batch"],
    eps: Float[Tensor, "batch *dims"],
    cond: Any = None,
) -> Float[Tensor, "batch"]:
    """||eps - eps_psi(alpha_t x + sigma_t eps, t, c)||^2, summed over a picture's elements: L_psi before its mean.

    For a network that predicts v, whose squared error is weighted by SNR / (SNR + 1) in the published code, it is the
    same number.
    """
    z = fake.process.diffuse(x, t, eps)
    return (predict(fake, z, t, cond, "eps") - eps).square().flatten(1).sum(dim=1)


def identity_loss(
    teacher: Float[Tensor, "batch *dims"],
    fake: Float[Tensor, "batch *dims"],
    x: Float[Tensor, "batch *dims"],
    alpha: float,
) -> Float[Tensor, "batch"]:
    """sum w (f_phi - f_psi) [(f_phi - x) - alpha (f_phi - f_psi)], w = 1 / max(mean |f_phi - x|, 1e-5) (w detached).

    Args:
        teacher, fake: f_phi and f_psi, the two networks' x0 for a noised ``x``.
        x: what the generator made.
        alpha: 1 makes the bracket f_psi - x.
    """
    with torch.no_grad():
        weight = 1 / (teacher - x).abs().flatten(1).mean(dim=1).clamp(min=1e-5)
    inner = fake - x if alpha == 1 else (teacher - x) - alpha * (teacher - fake)
    return weight * ((teacher - fake) * inner).flatten(1).sum(dim=1)


def score_identity_loss(
    teacher: Denoiser,
    fake: Denoiser,
    x: Float[Tensor, "batch *dims"],
    t: Float[Tensor, "batch"],
    eps: Float[Tensor, "batch *dims"],
    teacher_cond: Any | Callable[[Tensor], Any] = None,
    fake_cond: Any = None,
    alpha: float = 1.0,
    through_scores: bool = True,
) -> Float[Tensor, "batch"]:
    """L_sid(c_p, c_s) before its mean: `identity_loss` at z = alpha_t x + sigma_t eps, differentiable in ``x``.

    Args:
        x: what the generator made; its gradient comes directly and through the input of both networks.
        teacher_cond: c_p, what the teacher is told; or a function that gives it for the fake network's x0.
        fake_cond: c_s, what ``x`` was asked for.
        through_scores: False takes both networks' x0 as given, and alpha as 1: Diff-Instruct (arXiv:2305.18455),
            another method.
    """
    z = fake.process.diffuse(x, t, eps)
    with torch.set_grad_enabled(through_scores and torch.is_grad_enabled()):
        f_fake = predict(fake, z, t, fake_cond)
        told = teacher_cond(f_fake.detach()) if callable(teacher_cond) else teacher_cond
        f_teacher = predict(teacher, z, t, told)
    return identity_loss(f_teacher, f_fake, x, alpha if through_scores else 1.0)


def pseudo_labels(
    logits: Float[Tensor, "batch label"],
    forget: Sequence[int],
    uniform: Float[Tensor, "batch"] | None = None,
) -> Int[Tensor, "batch"]:
    """What a classifier takes each picture for among the labels that stay: the likeliest one, or a drawn one.

    Args:
        forget: labels that must not be chosen.
        uniform: numbers in [0, 1), by which one is drawn with the classifier's probabilities; None: the likeliest.
    """
    # a label that is out of the question (log 0) is still likelier than a forbidden one
    logits = logits.clamp(min=torch.finfo(logits.dtype).min)
    logits = logits.index_fill(1, torch.tensor(list(forget), device=logits.device), -math.inf)
    if uniform is None:
        return logits.argmax(dim=1)
    each = logits.double().softmax(dim=1)
    shares = each.cumsum(dim=1)
    chosen = (shares <= uniform.to(shares)[:, None] * shares[:, -1:]).sum(dim=1)
    # a number that rounding has put at the very end belongs to the last label that may be chosen
    last = logits.shape[1] - 1 - (each > 0).flip(1).long().argmax(dim=1)
    return torch.minimum(chosen, last)


def sound(losses: Float[Tensor, "batch"]) -> Float[Tensor, "some"]:
    """The losses that are finite; all of them where none is, so that whoever looks at their sum notices."""
    good = losses.detach().isfinite()
    return losses[good] if good.any() and not good.all() else losses
