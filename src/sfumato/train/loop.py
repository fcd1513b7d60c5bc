"""One training loop for every recipe: resumable to the same bits, on one process or many, safe against a kill.

All randomness of step ``i`` (which pictures, which noise) comes from ``(seed, i)`` and the place of a row in the batch.
So a checkpoint needs no random state and no data position: weights, averaged weights, optimiser and the step number
are everything; a resumed run repeats exactly what the uninterrupted one would have done, and several processes, or
gradients accumulated over micro-batches, see the same pictures and noise as one process does at once. (Dropout inside
the networks is the exception: its masks depend on how the batch is cut.)

Started by ``accelerate launch`` or ``torchrun``, the processes train in parallel: every one holds the whole model, or
with ``accelerate launch --use_fsdp --fsdp_version 2`` a part of it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput, SfumatoError
from sfumato.files import atomic_folder, clear_leftovers

from . import state
from .ahead import ahead, pinned
from .draw import Share, cut, step_seed
from .journal import Journal
from .schedule import NEUTRAL, Schedule, learning_rate


class Recipe(Protocol):
    """What a recipe provides; the loop does the rest.

    A recipe may have more: ``grid(rng)``, pictures [n, 3, height, width] in [0, 1] to look at while training lasts,
    drawn with the averaged weights; ``after_step(step)``, called after every update without gradients (for a second,
    slower copy of a network; list it in `modules` with ``requires_grad`` off, and it is part of the checkpoint);
    ``partial = True``, when some step's loss does not reach every trained parameter.
    """

    name: str

    def modules(self) -> dict[str, nn.Module]:
        """The networks of the run, by name: parameters that require gradients are trained, all are saved."""
        ...

    def batch(self, step: int, rng: torch.Generator, size: int) -> Any:
        """The data of ``size`` rows of one step, drawn with ``rng`` only; see `sfumato.train.draw`.

        On a GPU it is called ahead of its step, in a thread.
        """
        ...

    def loss(self, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, a mean over the rows, and figures to log, means as well."""
        ...


class Trained(nn.Module):
    """All networks of a run as one, so that one wrapper for parallel training sees whatever the recipe does with them.

    A recipe holds the networks themselves and may call any method of theirs; what runs in ``forward`` of the wrapper
    is synchronised.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        # Where sharding may cut, as the networks' libraries say.
        names = (getattr(m, "_no_split_modules", None) or () for m in modules.values())
        self._no_split_modules = sorted(set().union(*names))

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class Run:
    """One training run in one folder: ``checkpoint/`` (the latest), ``log.jsonl``, ``grids/`` and the tracker's files.

    ``fit`` trains from the latest checkpoint, or from the start, to the last step. Calling it again on a finished run
    returns at once with the averaged weights loaded.

    Raises:
        BadInput: the folder holds a run with another configuration (the differing field is named); more shares of a
            batch than rows; a way of launching that is not supported.
        SfumatoError: the loss is not finite (the last good checkpoint stays).
    """

    def __init__(self, recipe: Recipe, schedule: Schedule, folder: Path, config: dict[str, Any] | None = None):
        self.recipe, self.schedule, self.folder = recipe, schedule, Path(folder)
        self.accelerator = _accelerator(schedule.precision, getattr(recipe, "partial", False))
        self.modules, device = recipe.modules(), self.accelerator.device
        parts = schedule.accumulate * self.accelerator.num_processes
        if schedule.batch < parts:
            raise BadInput(f"a batch of {schedule.batch} cannot be cut into {parts} micro-batches on all processes")
        first = schedule.accumulate * self.accelerator.process_index
        self.rows = cut(schedule.batch, parts)[first : first + schedule.accumulate]
        # Sharding turns networks into something that only trains; what they were is put back at the end.
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        self.plain = copy.deepcopy(self.modules) if sharded else {}
        for module in self.modules.values():
            module.to(device)
            if schedule.compile:
                module.compile()
        trained = Trained(self.modules)
        optimizer = torch.optim.AdamW(
            [p for p in trained.parameters() if p.requires_grad],
            lr=schedule.lr,
            betas=schedule.betas,
            eps=schedule.eps,
            weight_decay=schedule.weight_decay,
            fused=device.type == "cuda",
        )
        self.trained, self.optimizer = self.accelerator.prepare(trained, optimizer)
        self.params = state.parameters(self.modules)
        self.average = {n: p.detach().clone() for n, p in self.params.items()}
        self.step = 0
        self.config = state.plain({"recipe": recipe.name, **asdict(schedule), **(config or {})})
        self.data: Iterator[Any] | None = None

    def fit(self, progress: bool = True) -> None:
        """Train to the last step, then put the averaged weights into the modules."""
        s, main = self.schedule, self.accelerator.is_main_process
        self.resume()
        began, start = time.perf_counter(), self.step
        with Journal(self.folder, self.config, s.track, self.step, main, progress) as journal:
            while self.step < s.steps:
                logs = self.one_step()
                due = self.step == s.steps or self.step % s.checkpoint_every == 0
                if due or self.step % 20 == 0:
                    figures = self._figures(logs)
                    # The first step warms up, or compiles; saving and drawing count, they will come again.
                    rate = max(1, self.step - start - 1) / (time.perf_counter() - began)
                    figures["pictures_per_second"] = round(rate * s.batch, 1)
                    figures["seconds_left"] = round((s.steps - self.step) / rate)
                    journal.log(self.step, figures)
                if s.grid_every and self.step % s.grid_every == 0:
                    journal.pictures(self.step, self.grid())
                if due:
                    self.save()
                if self.step == start + 1:
                    began = time.perf_counter()
                journal.advance(self.step)
        self.data = None
        self.accelerator.wait_for_everyone()
        state.finish(self.modules, self.params, self.average, self.plain)

    def finish(self, write: Callable[[], Any]) -> None:
        """Call ``write``, which writes what was trained, on one process; the others wait until it is there."""
        if self.accelerator.is_main_process:
            write()
        self.accelerator.wait_for_everyone()

    def one_step(self) -> dict[str, Tensor]:
        """One update; returns the figures to log of this process's rows (tensors: nothing waits for the device)."""
        s, i, world = self.schedule, self.step, self.accelerator.num_processes
        self.data = self.data or self._batches()
        logs: dict[str, Tensor] = {}
        for rows in self.rows:
            batch, rng = next(self.data), Share((s.seed, i, 1), rows, s.batch)
            _seed_globally(step_seed(s.seed, i, 2, rows.start))  # dropout inside the networks
            more_to_come = rows is not self.rows[-1]
            with self.accelerator.no_sync(self.trained) if more_to_come else nullcontext():
                loss, figures = self.trained(partial(self.recipe.loss, batch, rng))
                # The wrapper averages gradients over the processes; wanted is the mean over all rows.
                share = len(rows) / s.batch
                self.accelerator.backward(loss * (share * world))
            for name, value in {"loss": loss, **figures}.items():
                logs[name] = logs.get(name, 0) + value.detach() * share
        norm = self.accelerator.clip_grad_norm_(list(self.params.values()), s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(s, i)
        # Only scaled gradients need the wrapper, which is slow.
        (self.optimizer if self.accelerator.scaler else self.optimizer.optimizer).step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            state.lerp(self.average, self.params, 1 - min(s.ema, (1 + i) / (10 + i)))
            if hasattr(self.recipe, "after_step"):
                self.recipe.after_step(self.step)
        return {**logs, "grad_norm": state.whole(norm).detach() / world}

    def _batches(self) -> Iterator[Any]:
        """The data of this process from the present step on."""
        s, device = self.schedule, self.accelerator.device
        load = lambda i, rows: self.recipe.batch(i, Share((s.seed, i, 0), rows, s.batch), len(rows))
        jobs = ((i, rows) for i in range(self.step, s.steps) for rows in self.rows)
        if device.type != "cuda" or s.workers < 1:
            return starmap(load, jobs)
        move = lambda i, rows: send_to_device(pinned(load(i, rows)), device, non_blocking=True)
        return ahead(move, jobs, s.workers, partial(torch.cuda.set_device, device))

    def _figures(self, logs: dict[str, Tensor]) -> dict[str, float]:
        """The figures of all processes together.

        Raises:
            SfumatoError: one of them is not finite.
        """
        values = self.accelerator.reduce(torch.stack([v.float().mean() for v in logs.values()]), "sum")
        figures = dict(zip(logs, values.tolist(), strict=True))
        if not all(map(math.isfinite, figures.values())):
            raise SfumatoError(
                f"the loss is not finite at step {self.step} ({figures}); the last good checkpoint is in "
                f"{self.folder / 'checkpoint'}: lower the learning rate and go on from there"
            )
        return {**figures, "lr": learning_rate(self.schedule, self.step - 1)}

    @torch.no_grad()
    def grid(self) -> Float[Tensor, "n 3 height width"]:
        """The recipe's pictures by the averaged weights, in [0, 1], always from the same noise."""
        rng = torch.Generator().manual_seed(step_seed(self.schedule.seed, 0, 3))
        with state.evaluation(self.modules), state.swapped(self.params, self.average):
            draw = partial(self.recipe.grid, rng)  # type: ignore[attr-defined]  # only a recipe that has one
            return self.trained(draw).float().clamp(0, 1).cpu()

    def save(self) -> None:
        """Write ``checkpoint/``, or nothing: a kill at any moment leaves a whole one.

        Raises:
            BadInput: the disk is full; the checkpoint before stays.
        """
        files = state.collect(self.modules, self.params, self.average, self.optimizer)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            about = {"step": self.step, "format": state.FORMAT, "scaler": scaler, "config": self.config}
            with atomic_folder(self.folder / "checkpoint", overwrite=True) as folder:
                state.write(folder, files, about)

    def resume(self) -> None:
        """Load the latest checkpoint, if there is one.

        Raises:
            BadInput: it is one of another configuration or version, or damaged; another process writes it now.
        """
        folder = self.folder / "checkpoint"
        if self.accelerator.is_main_process:
            clear_leftovers(folder)
        self.accelerator.wait_for_everyone()
        if not (folder / "run.json").exists():
            return
        # A constant rate does not know when it ends.
        free = NEUTRAL | ({"steps"} if self.schedule.decay == "constant" else set())
        about = state.read(folder, self.config, free)
        state.load(folder, self.modules, self.params, self.average, self.optimizer)
        if self.accelerator.scaler and about["scaler"]:
            self.accelerator.scaler.load_state_dict(about["scaler"])
        self.step, self.data = about["step"], None


def _seed_globally(seed: int) -> None:
    """What networks draw from without being given a generator; quicker than torch's own ``manual_seed``."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _accelerator(precision: str, some_unused: bool) -> Accelerator:
    """This process's part in the run.

    Raises:
        BadInput: it was launched in a way that is not supported.
    """
    AcceleratorState._reset_state()  # one run in this process may be of another precision than the next
    ddp = DistributedDataParallelKwargs(find_unused_parameters=some_unused)
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise BadInput(f"training under {kind.value} is not supported: launch plain processes, or FSDP version 2")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise BadInput("FSDP version 1 is not supported: add --fsdp_version 2 to accelerate launch")
    return accelerator
