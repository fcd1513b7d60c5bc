"""Sequences of any length from a denoiser of W frames: Rolling Diffusion, and block by block as its baseline.

All randomness comes from ``generator`` (a list holds one per sequence); the steps are those of any sampler of
`sfumato.sample.samplers`, on a grid with one time per frame. Both ways cost ``steps`` network calls per frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput, unknown
from ..noise.denoiser import Denoiser
from ..noise.rolling import Phase, Window
from .samplers import Generators, ddpm, draw
from .times import uniform

Context = Float[Tensor, "batch clean channel height width"]
Frame = Float[Tensor, "batch channel height width"]
Schedule = Literal["rolling", "standard"]


def grid(window: Window, phase: Phase, steps: int, start: float = 1.0, end: float = 0.0) -> Float[Tensor, "n 1 frames"]:
    """Local times of ``steps`` equal steps of global time from ``start`` to ``end``, for any sampler."""
    return window.times(phase, uniform(steps, start, end))[:, None]


@torch.no_grad()
def roll(
    denoiser: Denoiser,
    context: Context,
    window: Window,
    steps: int,
    cond: Any = None,
    *,
    generator: Generators,
    sampler: Callable[..., Tensor] = ddpm,
) -> Iterator[Frame]:
    """Frames after ``context`` without end (arXiv:2402.09470, section 3 and appendix B), begun by the init phase.

    Each pass of ``steps`` steps takes the window from rolling time 1 to 0 and gives its first clean frame. The init
    phase before takes W - n times as many, the same number in a unit of local time. Memory: one window, for no
    gradients are kept.

    Args:
        denoiser: of windows [batch, frame, channel, height, width], with a time per frame.
        context: clean frames, at least ``window.clean``, of which the last are used; they come without noise.
        window: its W and n.
        steps: network calls (of one-call samplers) for each frame that comes out.
        cond: conditioning, handed to the denoiser.
        generator: of all noise.
        sampler: whose steps are taken; the paper's are ancestral.

    Raises:
        BadInput: fewer frames of context than the window begins with.
    """
    for z in _passes(denoiser, context, window, steps, cond, generator, sampler):
        yield z[:, window.clean]


@torch.no_grad()
def blocks(
    denoiser: Denoiser,
    context: Context,
    window: Window,
    steps: int,
    cond: Any = None,
    *,
    generator: Generators,
    sampler: Callable[..., Tensor] = ddpm,
) -> Iterator[Frame]:
    """Frames after ``context`` without end by ordinary video diffusion: W - n at a time, all at the same noise level.

    The last n frames of a block are the context of the next. Arguments as in `roll`; a block takes (W - n) ``steps``
    steps, so that each frame costs as much as there.
    """
    yield from _blocks(denoiser, context, window, steps, cond, generator, sampler)


def rollout(
    denoiser: Denoiser,
    context: Context,
    n_frames: int,
    window: Window,
    steps: int,
    cond: Any = None,
    *,
    generator: Generators,
    schedule: Schedule = "rolling",
    finish: bool = False,
    sampler: Callable[..., Tensor] = ddpm,
) -> Float[Tensor, "batch n_frames channel height width"]:
    """The ``n_frames`` frames after ``context``, by `roll` (``schedule="rolling"``) or `blocks` (``"standard"``).

    Args:
        finish: let the last window run out without a new frame entering, instead of dropping the frames after the
            last wanted one half-way. The cost is the same; a network trained on windows of noise up to 1 has not seen
            these. An extension of ours: the paper does not say how a sequence ends.

    The other arguments are those of `roll`. Differentiable where gradients are enabled.

    Raises:
        BadInput: no frames wanted, an unknown schedule, too little context, or ``finish`` with blocks.
    """
    if schedule not in (known := ("rolling", "standard")):
        raise unknown("schedule", schedule, known)
    if n_frames < 1:
        raise BadInput(f"a roll-out has at least one frame, not {n_frames}")
    if finish and schedule != "rolling":
        raise BadInput("a tail is left to finish only with the rolling schedule: blocks end whole")
    settings = (denoiser, context, window, steps, cond, generator, sampler)
    if schedule == "standard":
        return torch.stack(list(islice(_blocks(*settings), n_frames)), dim=1)
    passes = _passes(*settings)
    if not finish:
        return torch.stack([z[:, window.clean] for z in islice(passes, n_frames)], dim=1)
    windows = list(islice(passes, max(n_frames - window.noisy, 0) + 1))
    done, z = [z[:, window.clean] for z in windows[:-1]], windows[-1]
    if window.noisy > 1:
        left = window.noisy - 1
        times = grid(window, "rolling", steps * left, 0.0, -left)
        z = sampler(denoiser, z, times, cond, generator=generator)
    return torch.stack([*done, *z[:, window.clean :].unbind(1)], dim=1)[:, :n_frames]


def _passes(
    denoiser: Denoiser,
    context: Context,
    window: Window,
    steps: int,
    cond: Any,
    generator: Generators,
    sampler: Callable[..., Tensor],
) -> Iterator[Float[Tensor, "batch frames channel height width"]]:
    """The window at rolling time 0, after the init phase and then after every pass."""
    context = _context(context, window)
    init, rolling = grid(window, "init", steps * window.noisy), grid(window, "rolling", steps)
    z = torch.cat([context, _noise(context, window.noisy, generator)], dim=1)
    z = sampler(denoiser, z, init, cond, generator=generator)
    while True:
        yield z
        z = torch.cat([z[:, 1:], _noise(z, 1, generator)], dim=1)
        z = sampler(denoiser, z, rolling, cond, generator=generator)


def _blocks(
    denoiser: Denoiser,
    context: Context,
    window: Window,
    steps: int,
    cond: Any,
    generator: Generators,
    sampler: Callable[..., Tensor],
) -> Iterator[Frame]:
    """See `blocks`."""
    context = _context(context, window)
    times = grid(window, "standard", steps * window.noisy)
    while True:
        z = torch.cat([context, _noise(context, window.noisy, generator)], dim=1)
        z = sampler(denoiser, z, times, cond, generator=generator)
        yield from z[:, window.clean :].unbind(1)
        context = z[:, window.noisy :]


def _noise(like: Tensor, frames: int, generator: Generators) -> Tensor:
    return draw(like.new_empty(like.shape[0], frames, *like.shape[2:]), generator)


def _context(context: Context, window: Window) -> Context:
    if context.ndim != 5 or context.shape[1] < window.clean:
        raise BadInput(
            f"a roll-out needs {window.clean} frames of context, [batch, frame, channel, height, width]; "
            f"got a tensor of shape {tuple(context.shape)}"
        )
    return context[:, context.shape[1] - window.clean :]
