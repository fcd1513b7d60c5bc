"""Latents that a model itself passes through on its way to a concept: where erasers that train compare predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfumato.pipeline import Conditioning, Text2Image

from .finetune import ALL, seeds, uniform

AT_ONCE = 32
"""Trajectories that are sampled together, as many as a draw takes."""

Latents = Callable[..., tuple[Tensor, float]]
"""(rows of what is asked for, generator, share of the rows) -> (latents of the share, the time of all of them)."""


def fresh(source: Text2Image, asked: Conditioning, sampling_steps: int, **guidance: Any) -> Latents:
    """Latents x_i that ``source`` reaches after i of the steps, i uniform, sampled anew at every call."""

    def drawn(rows: Tensor, generator: torch.Generator, share: slice = ALL) -> tuple[Tensor, float]:
        i = uniform(sampling_steps, generator)
        starts = seeds(len(rows), generator)[share]
        return source.trajectory(
            asked[rows[share]], starts, stop_after=i, sampling_steps=sampling_steps, **guidance
        )

    return drawn


def pooled(
    source: Text2Image, asked: Conditioning, n: int, seed: int, sampling_steps: int, **guidance: Any
) -> Latents:
    """The same out of ``n`` whole trajectories, sampled once, here; at least one for each row of ``asked``.

    Memory: ``n`` times ``sampling_steps`` latents, and what sampling `AT_ONCE` of them takes.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(max(n, len(asked))) % len(asked)
    starts = seeds(len(rows), generator)
    whole = lambda some: source.states(asked[rows[some]], starts[some], sampling_steps=sampling_steps, **guidance)
    steps = zip(*(list(whole(some))[:-1] for some in _parts(len(rows))), strict=True)
    states = [(torch.cat([z for z, _ in step]), step[0][1]) for step in steps]

    def drawn(wanted: Tensor, generator: torch.Generator, share: slice = ALL) -> tuple[Tensor, float]:
        z, t = states[uniform(sampling_steps, generator)]
        of_row = [(rows == row).nonzero().flatten() for row in wanted]
        picked = [int(some[uniform(len(some), generator)]) for some in of_row]
        return z[picked[share]], t

    return drawn


def noised(source: Text2Image, asked: Conditioning, n: int, seed: int, sampling_steps: int, **guidance: Any) -> Latents:
    """Pictures that ``source`` draws, noised to one of its training times, the same for all of a call.

    Out of ``n`` that are drawn once, here, at least one for each row of ``asked``; 0: drawn anew at every call.
    """
    T, process = source.clock.timesteps, source.denoiser.process
    draw = lambda cond, starts: source.trajectory(
        cond, starts, stop_after=sampling_steps, sampling_steps=sampling_steps, **guidance
    )[0]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(max(n, len(asked)) if n else 0) % len(asked)
    starts = seeds(len(rows), generator)
    kept = torch.cat([draw(asked[rows[some]], starts[some]) for some in _parts(len(rows))]) if n else None

    def drawn(wanted: Tensor, generator: torch.Generator, share: slice = ALL) -> tuple[Tensor, float]:
        t = (1 + uniform(T, generator)) / T
        if kept is None:
            x = draw(asked[wanted[share]], seeds(len(wanted), generator)[share])
        else:
            of_row = [(rows == row).nonzero().flatten() for row in wanted]
            x = kept[[int(some[uniform(len(some), generator)]) for some in of_row][share]]
        eps = torch.randn(len(wanted), *x.shape[1:], generator=generator)[share]
        return process.diffuse(x, t, eps.to(x)), t

    return drawn


def _parts(n: int) -> list[slice]:
    return [slice(start, start + AT_ONCE) for start in range(0, n, AT_ONCE)]
