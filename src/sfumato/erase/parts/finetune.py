"""What erasers that train by gradient share: their run in the training loop, one generator per step, and the plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.pipeline import Model, Text2Image
from sfumato.pipeline.timing import seconds_per_row
from sfumato.train.loop import Run
from sfumato.train.processes import own_device
from sfumato.train.recipe import Recipe, Turn
from sfumato.train.schedule import Tuning

from ..base import Eraser
from .words import wrong_anchors

if TYPE_CHECKING:
    from sfumato.plan import Plan

StepLoss = Callable[..., Tensor]
"""(generator of the step, share of the batch's rows) -> loss; what is random is drawn for the whole batch."""
ALL = slice(None)
"""The share of a process that is alone, and takes all rows at once."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness in one step: it depends on (seed, step) alone, not on the steps before."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def uniform(n: int, generator: torch.Generator) -> int:
    """An integer from 0 to n - 1."""
    return int(torch.randint(n, (), generator=generator))


def seeds(n: int, generator: torch.Generator) -> list[int]:
    """Seeds for n trajectories."""
    return torch.randint(2**31, (n,), generator=generator).tolist()


@dataclass(frozen=True, kw_only=True)
class ByGradient(Tuning, Eraser):
    """Fields of an eraser that trains in the loop, and its run; not a method itself."""

    recomputes: ClassVar[bool] = True
    """Whether its losses can be recomputed in the backward pass; not where attention is edited for some calls only."""

    checkpointing: bool = False
    """Compute the networks' activations again in the backward pass instead of keeping them: much less memory, and about
    a third more time."""

    def __post_init__(self) -> None:
        Eraser.__post_init__(self)
        Tuning.__post_init__(self)
        if told := wrong_anchors(self.concepts, [self.anchor_for(i, "") for i in range(len(self.concepts))]):
            raise BadInput(f"{told[0]}: name something that stays for it to turn into, or nothing")

    @abstractmethod
    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """See `Eraser.erased`; with a ``folder``, what is learned is kept there, and a killed run goes on from it."""

    def within(self, folder: Path | None, pipe: Text2Image) -> tuple[Text2Image, dict[str, Any]]:
        if (device := own_device()) is not None:
            for part in pipe.parts().values():
                part.to(device)
        if not self.checkpointing:
            return self.erased(pipe, folder)
        with recomputing(pipe.network) as before:
            made, log = self.erased(pipe, folder)
        settle(made.network, before)
        return made, log

    def check(self, pipe: Model) -> None:
        """See `Eraser.check`."""
        super().check(pipe)
        if not self.checkpointing:
            return
        if not self.recomputes:
            raise BadInput(f"the losses of {type(self).__name__} cannot be recomputed: leave checkpointing off")
        if not getattr(pipe.network, "_supports_gradient_checkpointing", False):
            raise BadInput(f"a {type(pipe.network).__name__} cannot recompute activations: leave checkpointing off")

    def beyond(self) -> dict[str, Any]:
        return {name: value for name, value in super().beyond().items() if name != "checkpointing"}

    def costs(self, pipe: Text2Image) -> Plan:
        made = self.plan(pipe)
        if self.optimizer != "adam8bit" or "optimiser" not in made.memory:
            return made
        return replace(made, memory={**made.memory, "optimiser": made.memory["optimiser"] // 4})

    def held(self, rows: int) -> int:
        """How many of an update's rows one process differentiates at once."""
        return -(-rows // self.accumulate)

    def fit(self, recipe: Finetuning, folder: Path | None) -> list[float]:
        """`course` of a recipe with one loss: the losses, one per update."""
        return self.course(recipe, recipe.pipe, folder)["loss"]

    def course(self, recipe: Recipe, model: Model, folder: Path | None) -> dict[str, list[float]]:
        """Train whatever alternates; the losses as `Run.history` has them. What was trained ends up frozen.

        Args:
            model: what is erased from; a run in a folder goes on with no other.
        """
        config = self.beyond()
        if folder is not None:
            config["model"] = model.describe()["sha256"]
        history = Run(recipe, self, folder, config).fit(self.progress)
        for module in recipe.modules().values():
            module.requires_grad_(False)
        return history


@contextmanager
def recomputing(network: nn.Module) -> Iterator[dict[str, bool]]:
    """In the block the network's blocks, and those of copies made there, keep no activations for the backward pass.

    Yields:
        What was so before, for `settle`.
    """
    kept = {name: m.gradient_checkpointing for name, m in network.named_modules() if _can_recompute(m)}
    network.enable_gradient_checkpointing()
    try:
        yield kept
    finally:
        settle(network, kept)


def settle(network: nn.Module, kept: Mapping[str, bool]) -> None:
    """Put back which blocks of a network, or of its copy, keep no activations."""
    for name, flag in kept.items():
        network.get_submodule(name).gradient_checkpointing = flag


def _can_recompute(module: nn.Module) -> bool:
    return isinstance(getattr(module, "gradient_checkpointing", None), bool)


class InTurns(Recipe):
    """Parts of a pipeline, and whatever is trained beside them, as the loop sees them."""

    partial = True

    def __init__(
        self,
        name: str,
        concepts: Sequence[str],
        pipe: Text2Image,
        modules: dict[str, nn.Module],
        turns: Sequence[Turn],
    ):
        self.name, self.title, self.pipe = name, "erasing " + ", ".join(concepts), pipe
        self.trained, self.coming = modules, turns

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.dtype

    def modules(self) -> dict[str, nn.Module]:
        return self.trained

    def turns(self) -> Sequence[Turn]:
        return self.coming


class Finetuning(InTurns):
    """Part of a pipeline, trained by one loss."""

    def __init__(
        self,
        name: str,
        concepts: Sequence[str],
        pipe: Text2Image,
        module: nn.Module,
        loss: StepLoss,
        seed: int,
        optimizer: Callable[..., torch.optim.Optimizer],
        lr: float | Callable[[int], float] | None = None,
    ):
        self.module, self.step_loss, self.seed = module, loss, seed
        self.turn = Turn(name="all", loss=self.loss, optimizer=optimizer, lr=lr)
        super().__init__(name, concepts, pipe, {"trained": module}, [self.turn])

    def loss(self, batch: dict[str, int], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = rng.rows  # the loop gives a Share
        return self.step_loss(step_generator(self.seed, batch["step"]), slice(rows.start, rows.stop)), {}


def make_plan(pipe: Model, title: str, trained: int, passes: float, batch: int = 1) -> Plan:
    """Memory by part (bytes) and time, for Adam on ``trained`` numbers in float32 and that many network passes.

    One pass is timed here, on ``batch`` rows; a backward pass is taken to cost two forward ones.
    """
    from sfumato.plan import Plan, weights_of

    memory = weights_of(pipe.parts())
    memory |= {"trained copy": 4 * trained, "gradients": 4 * trained, "optimiser": 8 * trained}
    row = seconds_per_row(pipe, batch)
    return Plan(title, memory=memory, seconds=None if row is None else passes * batch * row)
