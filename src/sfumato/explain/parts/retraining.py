"""A classifier trained again from scratch, and what one gets wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfumato.errors import BadInput
from sfumato.train import draw
from sfumato.train.loop import Run
from sfumato.train.recipe import Recipe
from sfumato.train.schedule import Schedule

Retrain: TypeAlias = Callable[[Tensor, Tensor, int], nn.Module]
"""``retrain(pictures, labels, seed)``: a classifier from scratch."""


class Again(Recipe):
    """Cross-entropy on pictures in a tensor, in batches drawn at random."""

    name = "again"

    def __init__(self, network: nn.Module, x: Float[Tensor, "n *dims"], y: Int[Tensor, "n"]):
        self.network, self.x, self.y = network, x, y

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    @property
    def device(self) -> torch.device:
        return self.x.device

    def batch(self, step: int, rng: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        rows = draw.integers(len(self.x), size, rng).to(self.x.device)
        return self.x[rows], self.y[rows]

    def loss(self, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(self.network(batch[0]).float(), batch[1]), {}


def fresh(network: nn.Module, seed: int) -> nn.Module:
    """The same network with new weights, to be trained.

    Raises:
        BadInput: it has parameters in a layer that does not say how they begin.
    """
    made = copy.deepcopy(network)
    # Batch normalisation resets its statistics with its weights; where it has no weights these are all it has.
    layers = [layer for layer in made.modules() if hasattr(layer, "reset_parameters")]
    told = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    if left := [name for name, p in made.named_parameters() if id(p) not in told]:
        raise BadInput(f"{left[0]} of the network does not say how it begins: give retrain=, which trains from scratch")
    with torch.random.fork_rng(sorted({p.device for p in made.parameters() if p.is_cuda}, key=str)):
        torch.manual_seed(seed)
        for layer in layers:
            layer.reset_parameters()
    return made.requires_grad_(True)


def from_scratch(network: nn.Module, updates: int, batch: int, lr: float) -> Retrain:
    """AdamW and a cosine on a copy of ``network`` with fresh weights."""

    def retrain(x: Tensor, y: Tensor, seed: int) -> nn.Module:
        schedule = Schedule(updates=updates, batch=batch, lr=lr, warmup=0, ema=0.0, seed=seed, track="none")
        recipe = Again(fresh(network, seed).train(), x, y)
        Run(recipe, schedule).fit(progress=False)
        return recipe.network.eval().requires_grad_(False)

    return retrain


@torch.no_grad()
def said(network: nn.Module, x: Float[Tensor, "n *dims"], batch: int) -> Int[Tensor, "n"]:
    """The class that the network gives to each picture; its weights and ``x`` may lie on different devices."""
    device = next((p.device for p in network.parameters()), x.device)
    return torch.cat([network(some.to(device)).argmax(1).to(x.device) for some in x.split(batch)])
