"""What erasers that train by gradient share: the loop, one generator per step, and the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sfumato.errors import SfumatoError
from sfumato.pipeline import Text2Image
from sfumato.pipeline.timing import seconds_per_row
from sfumato.progress import track

if TYPE_CHECKING:
    from sfumato.plan import Plan


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness in one step: it depends on (seed, step) alone, not on the steps before."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def uniform(n: int, generator: torch.Generator) -> int:
    """An integer from 0 to n - 1."""
    return int(torch.randint(n, (), generator=generator))


def seeds(n: int, generator: torch.Generator) -> list[int]:
    """Seeds for n trajectories."""
    return torch.randint(2**31, (n,), generator=generator).tolist()


def finetune(
    loss_of: Callable[[torch.Generator], Tensor],
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    seed: int,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    progress: bool = False,
    label: str = "",
) -> list[float]:
    """Minimise ``loss_of(generator of the step)``; the losses, one per step. The parameters end up frozen.

    Raises:
        SfumatoError: the loss is no longer a finite number.
    """
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    losses = []
    for step in track(range(steps), label, progress):
        loss = loss_of(step_generator(seed, step))
        if not torch.isfinite(loss):
            raise SfumatoError(f"the loss is no longer finite at step {step}: use a smaller learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
        losses.append(float(loss.detach()))
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return losses


def make_plan(pipe: Text2Image, title: str, trained: int, passes: float, batch: int = 1) -> Plan:
    """Memory by part (bytes) and time, for Adam on ``trained`` numbers and that many network passes.

    One pass is timed here, on ``batch`` rows; a backward pass is taken to cost two forward ones.
    """
    from sfumato.plan import Plan

    size = pipe.dtype.itemsize
    weights = sum(p.numel() for part in pipe.parts().values() for p in part.parameters())
    memory = {"weights": (weights + trained) * size, "gradients": trained * size, "optimiser": 2 * trained * size}
    return Plan(title, memory=memory, seconds=passes * batch * seconds_per_row(pipe, batch))
