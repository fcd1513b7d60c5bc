"""Feature attributions: a classifier, pictures and classes to maps shaped like the pictures.

A map's number says how much that value speaks for the class, with its sign where the rule has one. Each rule looks at
every picture alone, and takes its random numbers from a generator. What stands before a rule's name changes its maps:
``minus:gradient``, ``squared:smoothgrad``; `maps_of` does so when the maps of all pictures are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, pad

from sfumato.errors import BadInput, unknown

Attribution: TypeAlias = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
"""``rule(network, x, classes, generator)``: maps for pictures ``x``, shaped like them or with one channel."""

CAPTUM = "captum:"
STEPS = 32
"""Points of the path of integrated gradients."""
SAMPLES = 16
"""Noised copies of SmoothGrad."""
NOISE = 0.15
"""Deviation of SmoothGrad's noise as a share of a picture's range."""


def gradient(
    network: nn.Module, x: Float[Tensor, "n *dims"], classes: Int[Tensor, "n"], rng: torch.Generator | None = None
) -> Float[Tensor, "n *dims"]:
    """d logit_c / dx: the direction of steepest ascent of the class's logit in the Euclidean metric."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = network(x).gather(1, classes[:, None])
        (slope,) = torch.autograd.grad(logits.sum(), x)
    return slope


def input_gradient(
    network: nn.Module, x: Float[Tensor, "n *dims"], classes: Int[Tensor, "n"], rng: torch.Generator | None = None
) -> Float[Tensor, "n *dims"]:
    """x times `gradient`; x = 0 is mid-grey for pictures in [-1, 1]."""
    return x * gradient(network, x, classes)


def integrated_gradients(
    network: nn.Module, x: Float[Tensor, "n *dims"], classes: Int[Tensor, "n"], rng: torch.Generator | None = None,
    baseline: float = 0.0, steps: int = STEPS,
) -> Float[Tensor, "n *dims"]:
    """(x - b) times the mean gradient on the way from b to x, at the middles of ``steps`` parts (arXiv:1703.01365).

    The sum of a map is the logit at x less that at b, up to the error of the sum.
    """
    way = x - baseline
    total = torch.zeros_like(x)
    for i in range(steps):
        total += gradient(network, baseline + way * ((i + 0.5) / steps), classes)
    return way * total / steps


def smoothgrad(
    network: nn.Module, x: Float[Tensor, "n *dims"], classes: Int[Tensor, "n"], rng: torch.Generator,
    noise: float = NOISE, samples: int = SAMPLES,
) -> Float[Tensor, "n *dims"]:
    """The mean `gradient` of ``samples`` copies with noise of ``noise`` times each picture's range
    (arXiv:1706.03825)."""
    flat = x.flatten(1)
    deviation = (noise * (flat.amax(1) - flat.amin(1))).reshape(-1, *[1] * (x.ndim - 1))
    total = torch.zeros_like(x)
    for _ in range(samples):
        total += gradient(network, x + deviation * _normal(x, rng), classes)
    return total / samples


def random(network: nn.Module, x: Tensor, classes: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal numbers: a direction that knows nothing."""
    return _normal(x, rng)


def zero(network: nn.Module, x: Tensor, classes: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Nothing speaks for anything."""
    return torch.zeros_like(x)


def edges(
    network: nn.Module, x: Float[Tensor, "n channel h w"], classes: Tensor, rng: torch.Generator | None = None
) -> Float[Tensor, "n channel h w"]:
    """The size of Sobel's gradient of each channel, which knows nothing of the network; its border is repeated."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).to(x)
    planes = pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    across, down = (conv2d(planes, k[None, None]) for k in (kernel, kernel.T))
    return (across.square() + down.square()).sqrt().reshape(x.shape)


ATTRIBUTIONS: Mapping[str, Attribution] = {
    "gradient": gradient,
    "input-gradient": input_gradient,
    "integrated-gradients": integrated_gradients,
    "smoothgrad": smoothgrad,
    "random": random,
    "zero": zero,
    "edges": edges,
}


def _shuffled(maps: Tensor, rng: torch.Generator) -> Tensor:
    # each takes that of the one before it in a random order, so that none keeps its own
    order = torch.randperm(len(maps), generator=rng).to(maps.device)
    return maps[order.roll(1)[order.argsort()]]


def _blurred(maps: Tensor, rng: torch.Generator) -> Tensor:
    return avg_pool2d(pad(maps, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


CHANGES: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "minus": lambda maps, rng: -maps,
    "squared": lambda maps, rng: maps.square(),
    "shuffled": _shuffled,
    "blurred": _blurred,
}
"""What may stand before a rule's name: the opposite map, its square, another picture's, the mean of 3 by 3 values."""


@dataclass(frozen=True)
class Changed:
    """A rule whose maps are changed; a call changes those of its own pictures among each other."""

    rule: Attribution
    change: Callable[[Tensor, torch.Generator], Tensor]

    def __call__(self, network: nn.Module, x: Tensor, classes: Tensor, rng: torch.Generator) -> Tensor:
        return self.change(self.rule(network, x, classes, rng), rng)


def attribution(name: str) -> Attribution:
    """The rule called ``name``: one of `ATTRIBUTIONS`, CHANGE:RULE, or captum:CLASS where captum is installed.

    Raises:
        BadInput: no such rule or change; captum is asked for and not installed.
    """
    change, _, rest = name.partition(":")
    if name.startswith(CAPTUM):
        return _of_captum(rest)
    if not rest:
        if name not in ATTRIBUTIONS:
            raise unknown("attribution", name, (*ATTRIBUTIONS, f"{CAPTUM}CLASS"))
        return ATTRIBUTIONS[name]
    if change not in CHANGES:
        raise unknown("change of an attribution", change, (*CHANGES, CAPTUM.rstrip(":")))
    return Changed(attribution(rest), CHANGES[change])


def _of_captum(which: str) -> Attribution:
    if find_spec("captum") is None:
        raise BadInput(f"{CAPTUM}{which} needs captum, which is not installed: pip install captum, or name another")
    attr = import_module("captum.attr")
    found: Any = getattr(attr, which, None)
    if not (isinstance(found, type) and issubclass(found, attr.Attribution) and hasattr(found, "attribute")):
        raise BadInput(f"captum has no attribution {which!r}: name a class of captum.attr, such as captum:Saliency")
    return lambda network, x, classes, rng: found(network).attribute(x.detach(), target=classes).detach()


def maps_of(
    rule: Attribution, name: str, network: nn.Module, x: Float[Tensor, "n *dims"], classes: Int[Tensor, "n"],
    rng: torch.Generator, batch: int,
) -> Float[Tensor, "n *dims"]:
    """The maps of all pictures, ``batch`` at a time, spread over the channels where they have one for all.

    Raises:
        BadInput: maps of another shape, or not finite.
    """
    if isinstance(rule, Changed):
        return _finite(name, rule.change(maps_of(rule.rule, name, network, x, classes, rng, batch), rng))
    parts = []
    for some, asked in zip(x.split(batch), classes.split(batch), strict=True):
        made = rule(network, some, asked, rng).detach().to(some)
        if made.shape != some.shape and made.shape != (some.shape[0], 1, *some.shape[2:]):
            raise BadInput(
                f"the attribution {name!r} gives maps shaped {tuple(made.shape)} for pictures shaped "
                f"{tuple(some.shape)}: give one number for each value, or one channel for all"
            )
        parts.append(_finite(name, made).expand_as(some))
    return torch.cat(parts)


def _finite(name: str, maps: Tensor) -> Tensor:
    if not maps.isfinite().all():
        raise BadInput(f"the attribution {name!r} gives numbers that are not finite: leave it out")
    return maps


def _normal(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)
