"""Samplers of tokens: many are updated at once, by rates that stand still during a step.

All have the signature of the other samplers, ``sampler(denoiser, x, times, cond, generator, callback)``, for a
`sfumato.noise.DiscreteDenoiser` and tokens x at ``times[0]``. With ``clean`` a last call leaves no noise: masks become
the likeliest kind of token by chance, and tokens of other chains the value with the largest posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from ..errors import BadInput
from ..noise.denoiser import DiscreteDenoiser
from ..noise.discrete import pick
from .samplers import Callback, Generators, _report, _steps

CLEANEST = 1e-5
"""The time at which tokens count as clean."""


def rates(denoiser: DiscreteDenoiser, x: Int[Tensor, "batch *dims"], t: Any, cond: Any = None) -> Tensor:
    """The denoiser's prediction as rates of jumps, [batch, *dims, states]; 0 at the token's own value.

    Raises:
        BadInput: a denoiser of something else than tokens.
    """
    if not hasattr(denoiser.process, "states"):
        raise BadInput("this samples tokens, and the model draws none: `sfumato train discrete` makes one that does")
    return denoiser.process.convert(denoiser(x, t, cond), x, t, denoiser.prediction, "rates")


def euler_law(
    rate: Float[Tensor, "*dims states"], x: Int[Tensor, "*dims"], length: Float[Tensor, "..."] | float
) -> Float[Tensor, "*dims states"]:
    """onehot(x) + length R, with R's diagonal minus the sum of its row; what would be negative is 0."""
    own = one_hot(x, rate.shape[-1]).to(rate)
    return (own * (1 - length * rate.sum(-1, keepdim=True)) + length * rate * (1 - own)).clamp(min=0)


def euler(
    denoiser: DiscreteDenoiser,
    x: Int[Tensor, "batch *dims"],
    times: Float[Tensor, "steps+1"],
    cond: Any = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    clean: bool = True,
) -> Int[Tensor, "batch *dims"]:
    """Tau-leaping with at most one jump a token and step: each is drawn from `euler_law`. One network call a step."""

    def move(rate: Tensor, x: Tensor, length: float) -> Tensor:
        return pick(euler_law(rate, x, length), uniform(x, generator).to(rate))

    return _leap(denoiser, x, times, cond, generator, callback, clean, move)


def tau_leaping(
    denoiser: DiscreteDenoiser,
    x: Int[Tensor, "batch *dims"],
    times: Float[Tensor, "steps+1"],
    cond: Any = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    clean: bool = True,
) -> Int[Tensor, "batch *dims"]:
    """Tau-leaping of ordered values (arXiv:2205.14987, section 4.1): Poisson numbers of all jumps, added up.

    x + sum_y Poisson(length R_y) (y - x), held to the states that there are. One network call a step.

    Raises:
        BadInput: a chain with a mask, which has no place in an order.
    """
    if getattr(denoiser.process, "mask", None) is not None:
        raise BadInput("masks are in no order, so their jumps cannot be added up: use euler or k_gillespie")
    states = denoiser.process.states

    def move(rate: Tensor, x: Tensor, length: float) -> Tensor:
        jumps = poisson(rate * length, generator)
        away = torch.arange(states, device=x.device) - x[..., None]
        return (x + (jumps * away).sum(-1).round().long()).clamp(0, states - 1)

    return _leap(denoiser, x, times, cond, generator, callback, clean, move)


def k_gillespie(
    denoiser: DiscreteDenoiser,
    x: Int[Tensor, "batch *dims"],
    counts: Int[Tensor, "steps+1"],
    cond: Any = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    clean: bool = True,
) -> Int[Tensor, "batch *dims"]:
    """Gillespie's rule for several jumps at once (arXiv:2407.21243, algorithm 1), from masks.

    Each token has an exponential holding time by its total rate; in a step the next counts[i+1] - counts[i] of them
    jump, and the time goes back by the longest of their holding times, for every row by itself. One call a step.

    Args:
        counts: how many tokens are decoded before each step and at the end, increasing from 0.

    Raises:
        BadInput: counts that do not increase from 0, or more than there are tokens; a chain without a mask.
    """
    process, positions = denoiser.process, x[0].numel()
    if getattr(process, "mask", None) is None:
        raise BadInput("k-Gillespie counts tokens that are decoded, so it needs a chain with a mask: use euler")
    steps = [int(k) for k in counts]
    if len(steps) < 2 or steps[0] != 0 or any(b <= a for a, b in pairwise(steps)) or steps[-1] > positions:
        raise BadInput(f"the counts must increase from 0 to at most {positions} tokens, got {steps}")
    t = torch.ones(len(x), dtype=torch.float64, device=x.device)
    for step, (k, after) in enumerate(pairwise(steps)):
        rate = rates(denoiser, x, t, cond).flatten(1, -2)
        flat = x.flatten(1)
        total = rate.sum(-1)
        holding = -torch.log1p(-uniform(flat, generator)).to(total) / total
        holding = torch.where(total > 0, holding, torch.inf)
        when, where = holding.topk(after - k, dim=1, largest=False)
        drawn = pick(rate, uniform(flat, generator).to(rate))
        moved = flat.scatter(1, where, drawn.gather(1, where))
        x = torch.where(total > 0, moved, flat).view_as(x)
        t = (t - torch.where(when.isfinite(), when, 0.0).amax(1).double()).clamp(min=CLEANEST)
        _report(callback, step, counts[step + 1], x)
    return finish(denoiser, x, t, 0.0, cond, generator) if clean else x


def finish(
    denoiser: DiscreteDenoiser,
    x: Int[Tensor, "batch *dims"],
    t: Any,
    length: float,
    cond: Any = None,
    generator: Generators | None = None,
) -> Int[Tensor, "batch *dims"]:
    """Tokens without noise, by one more call at ``t``.

    With a mask: drawn from `euler_law` of a step as long as the last was, among the real tokens alone (a mask has its
    rates, in proportion, whatever the length). Else the value with the largest posterior. The published code tells the
    network the time before the last step here instead of the last.
    """
    mask = getattr(denoiser.process, "mask", None)
    if mask is None:
        pred = denoiser(x, t, cond)
        return denoiser.process.convert(pred, x, t, denoiser.prediction, "posterior").argmax(-1)
    rate = rates(denoiser, x, t, cond)
    law = euler_law(rate, x, length or 1.0)
    law = torch.where((x == mask)[..., None], law, one_hot(x, law.shape[-1]).to(law))
    law = law * (torch.arange(law.shape[-1], device=law.device) != mask)
    return pick(law, uniform(x, generator).to(law))


def uniform(like: Int[Tensor, "batch *dims"], generator: Generators | None) -> Float[Tensor, "batch *dims"]:
    """Uniform numbers in [0, 1), float64, drawn where the generator lives; a list holds one for each row."""
    return _drawn(like.shape, generator, lambda shape, g: torch.rand(shape, generator=g, dtype=torch.float64)).to(
        like.device
    )


def poisson(mean: Float[Tensor, "batch *dims"], generator: Generators | None) -> Float[Tensor, "batch *dims"]:
    """Poisson numbers with these means."""
    if isinstance(generator, list):
        return torch.cat([poisson(row[None], g) for row, g in zip(mean, generator, strict=True)])
    if generator is None:
        raise BadInput("this sampler draws numbers: pass generator=torch.Generator().manual_seed(...)")
    return torch.poisson(mean.to(generator.device), generator=generator).to(mean.device)


def _drawn(shape: Any, generator: Generators | None, draw: Callable[..., Tensor]) -> Tensor:
    if generator is None:
        raise BadInput("this sampler draws numbers: pass generator=torch.Generator().manual_seed(...)")
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise BadInput(f"{len(generator)} generators for {shape[0]} rows: give one each")
        return torch.cat([draw((1, *shape[1:]), g) for g in generator])
    return draw(tuple(shape), generator)


def _leap(
    denoiser: DiscreteDenoiser,
    x: Int[Tensor, "batch *dims"],
    times: Float[Tensor, "steps+1"],
    cond: Any,
    generator: Generators | None,
    callback: Callback | None,
    clean: bool,
    move: Callable[[Tensor, Tensor, float], Tensor],
) -> Int[Tensor, "batch *dims"]:
    if not (times.diff(dim=0) < 0).all():  # nor are numbers that are none in order
        raise BadInput("tokens are sampled from noise (1) to clean (0): the times must decrease")
    length = 0.0
    for step, t, s in _steps(times):
        length = float(t - s)
        x = move(rates(denoiser, x, t, cond), x, length)
        _report(callback, step, s, x)
    end = times[-1].clamp(min=CLEANEST)
    return finish(denoiser, x, end, length, cond, generator) if clean else x
