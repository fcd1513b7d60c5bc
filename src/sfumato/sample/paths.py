"""Many views from a denoiser of few: blocks whose borders change from step to step, so that all come to agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import BadInput
from ..noise.denoiser import Denoiser
from ..noise.process import GaussianProcess, Prediction

Order = Literal["mixed", "consecutive"]


def partition(
    n: int, length: int, step: int, order: Order = "mixed", seed: int = 0
) -> list[Int[Tensor, "view"]]:
    """``n`` views in blocks of at most ``length``, each view in exactly one; which, depends on the step (from 0).

    "mixed" alternates between neighbours, neighbours with the borders moved by half a block, and views at random, so
    that near ones and far ones meet; "consecutive" always takes neighbours. With n <= length there is one block, in
    order.

    Raises:
        BadInput: no views, or blocks of none.
    """
    if n < 1 or length < 1:
        raise BadInput(f"a path has at least one view, and a block too: not {n} and {length}")
    views = torch.arange(n)
    if n <= length:
        return [views]
    kind = step % 3 if order == "mixed" else 0
    if kind == 2:
        views = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    first = length // 2 if kind == 1 else 0
    return ([views[:first]] if first else []) + list(views[first:].split(length))


@dataclass(eq=False)
class Blocks:
    """A denoiser of ``views`` views that at every call denoises each block of a `partition` by itself, and once.

    Every call is a step, so that the partition changes from one to the next; one of these serves one walk. With views
    <= length it is the denoiser itself, to the bit.

    Attributes:
        of: the denoiser of some of the views, told what belongs to those.
        views, length, order, seed: of the partitions.
    """

    of: Callable[[Tensor], Denoiser]
    views: int
    length: int
    order: Order = "mixed"
    seed: int = 0
    _whole: Denoiser = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._step, self._whole = 0, self.of(torch.arange(self.views))

    @property
    def process(self) -> GaussianProcess:
        return self._whole.process

    @property
    def prediction(self) -> Prediction:
        return self._whole.prediction

    def __call__(self, z: Float[Tensor, "batch view *dims"], t: Tensor | float, cond: Any = None) -> Tensor:
        """The prediction for all views at time ``t``, one number or one a scene; ``cond`` is not listened to."""
        blocks = partition(self.views, self.length, self._step, self.order, self.seed)
        self._step += 1
        if len(blocks) == 1:
            return self._whole(z, t)
        parts = [self.of(block)(z[:, block.to(z.device)], t) for block in blocks]
        return torch.cat(parts, dim=1)[:, torch.cat(blocks).argsort().to(z.device)]
