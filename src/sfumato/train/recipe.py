"""What the loop trains: a `Recipe` of one loss, or of several `Turn`s that alternate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Loss = Callable[[Any, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""(batch, generator) -> the scalar loss, a mean over the rows, and figures to log, means as well."""
Gradients = dict[str, Tensor]
"""Gradients by the names of their parameters."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What is trained by one loss and one optimiser, and how often it comes.

    An update of the loop is a round in which every turn comes ``times`` times, in the order of `Recipe.turns`, if it
    comes at all in that round. The turns of a round are told the same batch, and may leave in it what a later one
    needs (put there detached), unless a turn is ``fresh``.
    """

    name: str
    loss: Loss | Mapping[str, Loss]
    """One loss; or several by name, each with a pass and gradients of its own, which `Recipe.combine` puts together."""
    trains: Sequence[str] | None = None
    """Networks of `Recipe.modules` by name, or parts or parameters of them ("net.head"); None: all of them."""
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    """Any of torch's, called with parameters and ``lr``, as in ``partial(torch.optim.Adam, betas=(0.0, 0.99))``; None:
    AdamW with the schedule's settings."""
    lr: float | Callable[[int], float] | None = None
    """None: the schedule's rate; a number: the same course with that for the highest; or the rate at update i."""
    clip_norm: float | None = None
    """Largest norm of all gradients of the turn together; 0: any; None: the schedule's."""
    clip_value: float = 0.0
    """Largest absolute value of any gradient; 0: any."""
    ema: float | None = None
    """Decay of the averaged weights; 0: the last weights count, no average is kept; None: the schedule's."""
    every: int = 1
    """It comes in every so many rounds,"""
    first: int = 0
    """from this round on, counted from 0,"""
    times: int = 1
    """and then that many times in a row."""
    fresh: bool = False
    """Draw a batch of its own every time."""

    def __post_init__(self) -> None:
        if min(self.every, self.times) < 1 or self.first < 0:
            raise ValueError(f"turn {self.name!r}: every and times must be at least 1, and first not negative")

    @property
    def losses(self) -> Mapping[str, Loss]:
        """The losses by name; a single one is called "loss"."""
        return self.loss if isinstance(self.loss, Mapping) else {"loss": self.loss}

    def comes(self, step: int) -> int:
        """How many times it comes in round ``step``, counted from 0."""
        return self.times if step >= self.first and (step - self.first) % self.every == 0 else 0

    def has(self, parameter: str) -> bool:
        """Whether it trains ``parameter``, called MODULE.PARAMETER."""
        return self.trains is None or any(parameter == t or parameter.startswith(f"{t}.") for t in self.trains)


class Recipe(ABC):
    """What is trained, on what, by which loss; the loop does the rest.

    A recipe with one loss gives `modules`, `batch` and `loss`. What alternates gives `turns` instead of `loss`.
    """

    name: str
    """Of the recipe, in the run's configuration."""
    title: str = ""
    """What the progress bar says; by default the name."""
    partial: bool = False
    """Some step's loss does not reach every parameter that the turn trains."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The networks to train, by name: those of their parameters that require gradients. `Loose` holds others.

        A checkpoint holds what is trained and the buffers. What else changes in a run belongs to `copies`.
        """

    def copies(self) -> dict[str, nn.Module]:
        """Networks that no loss trains but that change in `after_update`, and so belong to the checkpoint."""
        return {}

    def batch(self, step: int, rng: torch.Generator, size: int) -> Any:
        """The data of ``size`` rows of one step, drawn with ``rng`` only; see `sfumato.train.draw`.

        On a GPU it is called ahead of its step, in a thread. By default the number of the step.
        """
        return {"step": step}

    def loss(self, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, a mean over the rows, and figures to log, means as well."""
        raise NotImplementedError(f"{type(self).__name__} says neither its loss nor its turns")

    def turns(self) -> Sequence[Turn]:
        """What alternates; by default one turn, of `loss`, for all parameters."""
        return [Turn(name="all", loss=self.loss)]

    def combine(self, turn: Turn, gradients: dict[str, Gradients]) -> Gradients:
        """One gradient of the several of a turn with several losses, for surgery; by default their sum."""
        total: Gradients = {}
        for part in gradients.values():
            for name, gradient in part.items():
                total[name] = total[name] + gradient if name in total else gradient
        return total

    def gradients(self, turn: Turn, gradients: Gradients) -> Gradients:
        """What the optimiser is given in place of ``gradients``, before clipping, as for a projection.

        They are means over all rows of the update, on all processes. A parameter left out is not changed.
        """
        return gradients

    def enough(self, step: int) -> bool:
        """Whether to stop before round ``step``, counted from 0, as when a goal is reached; asked before every round.

        It follows from the weights alone, and is the same on all processes: a run that goes on stops where it had.
        """
        return False

    def after_update(self, turn: Turn, step: int) -> None:  # noqa: B027
        """Change weights after an optimiser's update, without gradients: copies, projections, weight clipping.

        ``step`` counts rounds from 1; a turn that comes several times in a round is followed by as many calls.
        """

    def grid(self, rng: torch.Generator) -> Float[Tensor, "n 3 height width"]:
        """Pictures in [0, 1] to look at while training lasts, drawn with the averaged weights; see `draws`."""
        raise NotImplementedError(f"{type(self).__name__} has no pictures to look at")

    @property
    def draws(self) -> bool:
        """Whether it has a `grid`."""
        return type(self).grid is not Recipe.grid

    @property
    def device(self) -> torch.device | None:
        """Where it trains, if it must stay where its networks are; None: where the run's process does."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """What its networks compute in; the gradients of float16 are scaled."""
        dtypes = {p.dtype for module in self.modules().values() for p in module.parameters()}
        return torch.float16 if torch.float16 in dtypes else torch.float32


class Loose(nn.Module):
    """Parameters that belong to no network of their own, such as an adapter's factors or a learned word's rows."""

    def __init__(self, parameters: Mapping[str, nn.Parameter] | Iterable[nn.Parameter]):
        super().__init__()
        named = parameters if isinstance(parameters, Mapping) else {str(i): p for i, p in enumerate(parameters)}
        self._parameters.update(named)  # register_parameter refuses names of layers, which have dots
