"""The trainings of InstaFlow as the loop sees them: reflow, and distillation to one step, both from stored pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato.data import oracle
from sfumato.errors import BadInput
from sfumato.metrics.perceptual import LPIPS, lpips_missing, oracle_distance
from sfumato.train.draw import integers
from sfumato.train.draw import uniform as uniformly
from sfumato.train.recipe import Recipe

from .data import CleanData
from .flow import between, one_step, reflow_loss, velocity
from .pairs import PairStore

Perceptual = Literal["lpips", "oracle"]


class FromPairs(Recipe):
    """What both trainings share: pairs in batches, and pictures to look at; ``method`` is an `InstaFlow`."""

    def __init__(self, method: Any, student: Any, data: CleanData, store: PairStore):
        self.method, self.student, self.data, self.store = method, student, data, store

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student.network}

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        pairs = integers(self.store.count, size, rng)
        noise, clean = self.store.pairs(pairs)
        bare = uniformly(size, rng) < self.data.unconditional
        return {"step": step, "noise": noise, "clean": clean, "rows": pairs % len(self.data.pictures), "bare": bare}

    def told(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """X0, X1 and the condition of a batch, where the student is."""
        device = next(self.student.network.parameters()).device
        cond = self.data.conditioning(batch["rows"], batch["bare"])
        return batch["noise"].to(device), batch["clean"].to(device), cond

    @torch.no_grad()
    def grid(self, rng: torch.Generator, n: int = 16) -> Tensor:
        """Pictures of the student in one step."""
        x0, _, cond = self.told(self.batch(0, rng, n))
        z = one_step(velocity(self.student.denoiser, cond), x0)
        return (self.student.decode_latents(z) + 1).clamp(0, 2) / 2


class Reflow(FromPairs):
    """Stage 2: the velocity along straight lines between the pairs' ends."""

    name = "instaflow-reflow"
    title = "reflow"

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x0, x1, cond = self.told(batch)
        low = self.method.first_time
        t = uniformly(len(x0), rng).to(x0) * (1 - low) + low
        v = velocity(self.student.denoiser, cond)(between(x0, x1, t), t)
        return reflow_loss(v, x0, x1, self.method.reduction).mean(), {}


class OneStep(FromPairs):
    """Stage 4: the end of the flow in a single step, by squared error and then by a distance of pictures."""

    name = "instaflow"

    def __init__(self, method: Any, student: Any, data: CleanData, store: PairStore, distance: Any):
        super().__init__(method, student, data, store)
        self.distance = distance

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x0, x1, cond = self.told(batch)
        made = one_step(velocity(self.student.denoiser, cond), x0)
        error = reflow_loss(made - x0, x0, x1, self.method.reduction)
        told = {"error": (made.detach() - x1).square().mean().sqrt()}
        if batch["step"] < self.method.updates - self.method.perceptual_updates:
            return error.mean(), told
        ours, wanted = ((self.student.decode_latents(z) + 1) / 2 for z in (made, x1))
        return self.distance(ours, wanted.detach()).mean(), told


def check_distance(kind: Perceptual) -> None:
    """Refuse a distance that cannot be measured, before hours of pairs.

    Raises:
        BadInput: LPIPS is not on this machine.
    """
    if kind == "lpips" and (reason := lpips_missing()):
        told = "install it, choose perceptual oracle, or leave it out with perceptual_updates 0"
        raise BadInput(f"LPIPS cannot be measured here: {reason}; {told}")


def distance(kind: Perceptual) -> Callable[[Tensor, Tensor], Tensor]:
    """A perceptual distance of pictures in [0, 1], differentiable, wherever these are.

    Raises:
        BadInput: LPIPS is not on this machine.
    """
    judge: Any = LPIPS("alex") if kind == "lpips" else oracle_distance(oracle.load())
    network = judge.network if kind == "lpips" else nn.ModuleList(judge.layers)
    network.requires_grad_(False)

    def between_pictures(a: Tensor, b: Tensor) -> Tensor:
        network.to(a.device)
        return judge(a, b)

    return between_pictures
