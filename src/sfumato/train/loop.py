"""One training loop for every recipe: resumable to the same bits, on one process or many, safe against a kill.

All randomness of step ``i`` (which pictures, which noise) comes from ``(seed, i)`` and the place of a row in the batch.
So a checkpoint needs no random state and no data position: weights, averaged weights, optimiser and the step number
are everything; a resumed run repeats exactly what the uninterrupted one would have done, and several processes, or
gradients accumulated over micro-batches, see the same pictures and noise as one process does at once. (Dropout inside
the networks is the exception: its masks depend on how the batch is cut.) Exactly: on the same device with as many
threads and the same torch, whose sums are else rounded in another order; a run that goes on elsewhere says so.

Started by ``accelerate launch`` or ``torchrun``, the processes train in parallel: every one holds the whole model, or
with ``accelerate launch --use_fsdp --fsdp_version 2`` a part of it.

What is trained is updated in float32 whatever the networks' own precision: parameters of half precision have a master
each, of which they are the rounded copy.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput, SfumatoError
from sfumato.files import atomic_folder, clear_leftovers, held
from sfumato.finite import NONE, finite

from . import state
from .ahead import Batches, ahead, pinned
from .draw import Share, cut, step_seed
from .journal import Journal
from .optimizers import in_eight_bits
from .processes import Trained, joined, seed_globally
from .recipe import Gradients, Loose, Loss, Recipe, Turn
from .scale import LossScale
from .schedule import Schedule, learning_rate

__all__ = ["Loose", "Recipe", "Run", "Schedule", "Turn", "learning_rate"]


class Run:
    """One training run, in a folder: ``checkpoint/`` (the latest), ``log.jsonl``, ``grids/`` and the tracker's files.

    ``fit`` trains from the latest checkpoint, or from the start, to the last step, or to where the recipe has enough.
    Calling it again on a finished run returns at once with the averaged weights loaded. Without a folder it trains in
    memory and leaves nothing.

    Attributes:
        history: the losses, one for each time that a turn came: "loss", or "TURN/loss" where there are several turns.

    Raises:
        BadInput: the folder holds a run with another configuration (the differing field is named), or another process
            trains in it; more shares of a batch than rows; a way of launching that is not supported.
        SfumatoError: a loss or a weight is not finite; the step is said, and the last good checkpoint stays.
    """

    def __init__(
        self, recipe: Recipe, schedule: Schedule, folder: Path | None = None, config: dict[str, Any] | None = None
    ):
        self.recipe, self.schedule = recipe, (s := schedule.schedule())
        self.folder = None if folder is None else Path(folder)
        self.config = state.configuration(recipe.name, s, config)
        if s.grid_every and not recipe.draws:
            raise BadInput(f"{recipe.name} draws no pictures while it trains: leave grid_every at 0")
        self.turns = list(recipe.turns())
        self.accelerator = joined(s.precision, recipe.partial or len(self.turns) > 1)
        alone = self.accelerator.num_processes == 1
        self.device = recipe.device if recipe.device and alone else self.accelerator.device
        parts = s.accumulate * self.accelerator.num_processes
        if s.batch < parts:
            raise BadInput(f"a batch of {s.batch} cannot be cut into {parts} micro-batches on all processes")
        first = s.accumulate * self.accelerator.process_index
        self.rows = cut(s.batch, parts)[first : first + s.accumulate]
        self.modules, self.copies = recipe.modules(), recipe.copies()
        # Sharding turns networks into something that only trains; what they were is put back at the end.
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if sharded and any(isinstance(module, Loose) for module in self.modules.values()):
            raise BadInput(f"{recipe.name} trains parameters that cannot be sharded: launch plain processes")
        self.plain = copy.deepcopy(self.modules) if sharded else {}
        for module in (*self.modules.values(), *self.copies.values()):
            module.to(self.device)
        for module in self.modules.values() if s.compile else ():
            module.compile()
        self.trained = Trained(self.modules)
        if sharded:
            # Offered together with an optimiser only; ours come later, for what sharding made of the parameters.
            given = torch.optim.SGD(self.trained.parameters(), lr=0.0)
            self.trained, _ = self.accelerator.prepare(self.trained, given)
        elif not alone:
            self.trained = self.accelerator.prepare(self.trained)
        self.params = state.parameters(self.modules)
        self.masters = state.masters(self.params)
        self.updated = [self._updated(turn) for turn in self.turns]
        decays = {n: s.ema if turn.ema is None else turn.ema for turn in self.turns for n in self._names(turn)}
        wanted = sorted(set(decays.values()) - {0})
        self.decays = {decay: [n for n in self.masters if decays.get(n) == decay] for decay in wanted}
        kept = [n for names in self.decays.values() for n in names]
        self.average = {n: self.masters[n].detach().clone() for n in kept}
        self.scale = LossScale(s.precision == "fp16" or recipe.dtype == torch.float16)
        self.step = 0
        self.history: dict[str, list[float]] = {}
        self._told: dict[str, list[tuple[int, Tensor]]] = {}
        self.data: Iterator[Any] | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of a run with one turn, or of the first."""
        return self.updated[0].optimizer

    def _names(self, turn: Turn) -> list[str]:
        """The parameters that a turn trains."""
        names = [name for name in self.params if turn.has(name)]
        if not names:
            raise ValueError(f"turn {turn.name!r} trains none of {', '.join(self.modules)}: {turn.trains}")
        return names

    def _updated(self, turn: Turn) -> state.Updated:
        s, weights = self.schedule, {name: self.masters[name] for name in self._names(turn)}
        plain = partial(torch.optim.AdamW, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)
        make = turn.optimizer or partial(plain, fused=self.device.type == "cuda")
        make = in_eight_bits(make) if s.optimizer == "adam8bit" else make
        prefix = f"{turn.name}/" if len(self.turns) > 1 else ""
        return state.Updated(prefix, weights, make(list(weights.values()), lr=self.rate(turn)))

    def rate(self, turn: Turn, step: int = 0) -> float:
        """A turn's learning rate in round ``step``, counted from 0."""
        return turn.lr(step) if callable(turn.lr) else learning_rate(self.schedule, step, turn.lr)

    def fit(self, progress: bool = True) -> dict[str, list[float]]:
        """Train to the last step, then put the averaged weights into the modules; returns `history`."""
        s, main = self.schedule, self.accelerator.is_main_process
        with ExitStack() as stack:
            if self.folder and main:
                stack.enter_context(held(self.folder))
            cards = [self.device] if self.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(cards))  # steps seed what networks draw from
            self.resume()
            began, start = time.perf_counter(), self.step
            journal = Journal(self.folder, self.config, s.track, self.step, main, progress, self.recipe.title)
            stack.enter_context(journal)
            ended = self._ended()
            while not ended:
                logs = self.one_step()
                ended = self._ended()
                due = ended or self.step % s.checkpoint_every == 0
                if due or self.step % 20 == 0:
                    figures = self._figures(logs)
                    # The first step warms up, or compiles; saving and drawing count, they will come again.
                    rate = max(1, self.step - start - 1) / (time.perf_counter() - began)
                    figures["pictures_per_second"] = round(rate * s.batch, 1)
                    figures["seconds_left"] = round((s.updates - self.step) / rate)
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
            state.finish(self.modules, self.copies, {**self.masters, **self.average}, self.plain)
        return self.history

    def finish(self, write: Callable[[], Any]) -> None:
        """Call ``write``, which writes what was trained, on one process; the others wait until it is there."""
        if self.accelerator.is_main_process:
            write()
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _ended(self) -> bool:
        return self.step >= self.schedule.updates or self.recipe.enough(self.step)

    def one_step(self) -> dict[str, Tensor]:
        """One update, a round of all turns that come; returns the figures to log of this process's rows.

        They are tensors: nothing waits for the device.
        """
        i = self.step
        logs: dict[str, Tensor] = {}
        self.data = self.data or self._batches()
        coming = self._coming(i)
        shared = Batches(self.data, self.rows, keep=sum(len(t.losses) for t, *_ in coming if not t.fresh) > 1)
        for turn, k, n in coming:
            own = Batches(self.data, self.rows, keep=len(turn.losses) > 1) if turn.fresh else shared
            figures = self._take(turn, k, n, own)
            alone = len(self.turns) == 1
            logs |= figures if alone else {f"{turn.name}/{name}": value for name, value in figures.items()}
            loss = "loss" if alone else f"{turn.name}/loss"
            self._told.setdefault(loss, []).append((i + 1, logs[loss]))
        self.step += 1
        with torch.no_grad():
            for decay, names in self.decays.items():
                pick = lambda tensors, names=names: {n: tensors[n] for n in names}
                state.lerp(pick(self.average), pick(self.masters), 1 - min(decay, (1 + i) / (10 + i)))
        return logs

    def _coming(self, step: int) -> list[tuple[Turn, int, int]]:
        """The turns of round ``step`` in order, each with its place among the turns and which time of it this is."""
        return [(turn, k, n) for k, turn in enumerate(self.turns) for n in range(turn.comes(step))]

    def _take(self, turn: Turn, k: int, n: int, batches: Batches) -> dict[str, Tensor]:
        """One turn's update; the figures of this process's rows."""
        s, updated, several = self.schedule, self.updated[k], len(self.turns) > 1
        for name, p in self.params.items() if several else ():
            p.requires_grad_(name in updated.weights)  # what other turns train gets no gradients in this one
        logs: dict[str, Tensor] = {}
        parts: dict[str, Gradients] = {}
        for j, (name, loss) in enumerate(turn.losses.items()):
            # The first of all draws as a run without turns does.
            self._backward(name, loss, (k, n, j) if k or n or j else (), batches, logs)
            parts[name] = self._taken(updated)
        if len(parts) > 1:
            logs["loss"] = torch.stack([logs[name] for name in parts]).sum()
        gradients = self.recipe.combine(turn, parts) if len(parts) > 1 else parts[name]
        gradients = self.recipe.gradients(turn, gradients)
        weights = list(updated.weights.values())
        for name, master in updated.weights.items():
            master.grad = gradients.get(name)
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        if self.scale.sound(norm):  # that of an update that is left out is no figure, and would end the run
            logs["grad_norm"] = state.whole(norm).detach() / self.accelerator.num_processes
            if turn.clip_value:
                torch.nn.utils.clip_grad_value_(weights, turn.clip_value)
                norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
            if limit := s.clip_norm if turn.clip_norm is None else turn.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(weights, limit, norm)
            for group in updated.optimizer.param_groups:
                group["lr"] = self.rate(turn, self.step)
            updated.optimizer.step()
        for p in weights:
            p.grad = None
        for p in self.params.values() if several else ():
            p.requires_grad_(True)
        with torch.no_grad():
            state.hand_down(self.params, self.masters)
            self.recipe.after_update(turn, self.step + 1)
            if type(self.recipe).after_update is not Recipe.after_update:
                state.hand_up(self.params, self.masters)
        return logs

    def _backward(
        self, name: str, loss: Loss, which: tuple[int, ...], batches: Batches, logs: dict[str, Tensor]
    ) -> None:
        """Gradients of one loss over all rows of this process; its figures are added to ``logs``."""
        s, i = self.schedule, self.step
        for rows, batch in batches:
            rng = Share((s.seed, i, 1, *which), rows, s.batch)
            seed_globally(step_seed(s.seed, i, 2, rows.start, *which))  # dropout inside the networks
            more_to_come = rows is not self.rows[-1]
            with self.accelerator.no_sync(self.trained) if more_to_come else nullcontext():
                with self._autocast():
                    value, figures = self.trained(partial(loss, batch, rng))
                value = value if value.dtype == torch.float64 else value.float()
                # The wrapper averages gradients over the processes; wanted is the mean over all rows.
                share = len(rows) / s.batch
                (value * (share * self.accelerator.num_processes * self.scale.value)).backward()
            for key, figure in {name: value, **figures}.items():
                logs[key] = logs.get(key, 0) + figure.detach() * share

    def _taken(self, updated: state.Updated) -> Gradients:
        """The gradients that a turn's parameters have, in the precision of their masters; they have none afterwards."""
        found = {name: self.params[name].grad for name in updated.weights}
        for p in self.params.values():
            p.grad = None
        given = {name: g.to(updated.weights[name].dtype) for name, g in found.items() if g is not None}
        return given if self.scale.value == 1 else {name: g / self.scale.value for name, g in given.items()}

    def _autocast(self) -> AbstractContextManager:
        half = torch.float16 if self.schedule.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, half, enabled=self.schedule.precision != "no")

    def _batches(self) -> Iterator[Any]:
        """The data of this process from the present step on."""
        s, device = self.schedule, self.device

        def load(i: int, rows: range, which: tuple[int, ...]) -> Any:
            return self.recipe.batch(i, Share((s.seed, i, 0, *which), rows, s.batch), len(rows))

        def jobs() -> Iterator[tuple[int, range, tuple[int, ...]]]:
            for i in range(self.step, s.updates):
                drawn = False
                for turn, k, n in self._coming(i):
                    if turn.fresh or not drawn:
                        yield from ((i, rows, (k, n) if turn.fresh else ()) for rows in self.rows)
                    drawn |= not turn.fresh

        if device.type != "cuda" or s.workers < 1:
            return starmap(load, jobs())
        move = lambda *job: send_to_device(pinned(load(*job)), device, non_blocking=True)
        return ahead(move, jobs(), s.workers, partial(torch.cuda.set_device, device))

    def _figures(self, logs: dict[str, Tensor]) -> dict[str, float]:
        """The figures of all processes together.

        Raises:
            SfumatoError: one of them is not finite, or a loss was not since this was last asked.
        """
        figures = self._together(logs)
        fresh = [*self._gather(), *((self.step, name, value) for name, value in figures.items())]
        if bad := [(step, f"{name} {value}") for step, name, value in fresh if not math.isfinite(value)]:
            first = min(step for step, _ in bad)
            told = ", ".join(dict.fromkeys(what for step, what in bad if step == first))
            raise self._lost(f"the loss is not finite at step {first} ({told})")
        alone = len(self.turns) == 1
        rates = {"lr" if alone else f"{turn.name}/lr": self.rate(turn, self.step - 1) for turn in self.turns}
        return {**figures, **rates}

    def _lost(self, what: str) -> SfumatoError:
        there = self.folder is not None and (self.folder / "checkpoint" / "run.json").exists()
        kept = f"; the last good checkpoint is in {self.folder / 'checkpoint'}" if there else ""
        return SfumatoError(f"{what}: lower the learning rate{kept}")

    def _together(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        values = self.accelerator.reduce(torch.stack([v.float().mean() for v in tensors.values()]), "sum")
        return dict(zip(tensors, values.tolist(), strict=True))

    def _gather(self) -> list[tuple[int, str, float]]:
        """Bring `history` up to date; what is new in it: step, name and loss."""
        new = [(name, i, step, value) for name, told in self._told.items() for i, (step, value) in enumerate(told)]
        values = self._together({f"{name} {i}": value for name, i, _, value in new}) if new else {}
        fresh = [(step, name, values[f"{name} {i}"]) for name, i, step, _ in new]
        for _, name, value in fresh:
            self.history.setdefault(name, []).append(value)
        self._told = {}
        return fresh

    @torch.no_grad()
    def grid(self) -> Float[Tensor, "n 3 height width"]:
        """The recipe's pictures by the averaged weights, in [0, 1], always from the same noise."""
        rng = torch.Generator().manual_seed(step_seed(self.schedule.seed, 0, 3))
        with state.evaluation(self.modules), state.swapped(self.params, self.average), self._autocast():
            return self.trained(partial(self.recipe.grid, rng)).float().clamp(0, 1).cpu()

    def weights(self) -> dict[str, Tensor]:
        """All that changes: masters, buffers and copies, by name."""
        return {**self.masters, **state.rest(self.modules, self.copies)}

    def save(self) -> None:
        """Write ``checkpoint/``, or nothing: a kill at any moment leaves a whole one. In memory it only looks.

        Raises:
            BadInput: the disk is full; the checkpoint before stays.
            SfumatoError: a weight is not finite; the same.
        """
        for name, x in state.local({**self.masters, **self.average}).items():
            if not finite(x):
                raise self._lost(f"{name} is {NONE} after step {self.step}")
        if self.folder is None:
            return
        self._gather()
        files = state.collect(self.weights(), self.average, self.updated)
        files["history"] = {name: torch.tensor(values) for name, values in self.history.items()}
        if self.accelerator.is_main_process:
            about = {"step": self.step, "format": state.FORMAT, "scale": self.scale.state(), "config": self.config}
            about["machine"] = state.machine(self.device)
            with atomic_folder(self.folder / "checkpoint", overwrite=True) as folder:
                state.write(folder, files, about)

    def resume(self) -> None:
        """Load the latest checkpoint, if there is one.

        Raises:
            BadInput: it is one of another configuration or version, or damaged; another process writes it now.
        """
        if self.folder is None:
            return
        folder = self.folder / "checkpoint"
        if self.accelerator.is_main_process:
            clear_leftovers(folder)
        self.accelerator.wait_for_everyone()
        if (about := state.goes_on(self.folder, self.config)) is None:
            return
        if self.accelerator.is_main_process and about["step"] < self.schedule.updates:
            state.tell_changes(self.folder, about.get("machine"), state.machine(self.device))
        self.history = state.load(folder, self.weights(), self.average, self.updated)
        with torch.no_grad():
            state.hand_down(self.params, self.masters)
        self.scale.restore(about.get("scale"))
        self.step, self.data, self._told = about["step"], None, {}
