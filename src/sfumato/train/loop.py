"""One training loop for every recipe: resumable to the same bits, safe against a kill at any moment.

All randomness of step ``i`` (which pictures, which noise, dropout) comes from generators seeded by ``(seed, i)``.
So a checkpoint needs no random state and no data position: weights, averaged weights, optimiser and the step number
are everything, and a resumed run repeats exactly what the uninterrupted one would have done.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.errors import BadInput, SfumatoError, unknown
from sfumato.files import disk_is_full
from sfumato.progress import console


class Recipe(Protocol):
    """What a recipe provides; the loop does the rest."""

    name: str

    def modules(self) -> dict[str, nn.Module]:
        """The networks to train, by name."""
        ...

    def batch(self, step: int, rng: torch.Generator, size: int) -> Any:
        """The data of one step, drawn with ``rng`` only."""
        ...

    def loss(self, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss and figures to log."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: the settings of the loop itself."""

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    """Steps of linear warm-up."""
    decay: str = "cosine"
    """How the rate then goes to ``final_lr`` times ``lr``: "cosine", "linear", or not at all: "constant"."""
    final_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decays of the averaged gradient and of its square."""
    eps: float = 1e-8
    """AdamW's constant in the denominator."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, reached gradually: min(ema, (1 + i) / (10 + i)) at step i."""
    precision: str = "auto"
    """"no", "bf16" or "fp16": accelerate's mixed precision; "auto": bf16 where the device has it, else no."""
    seed: int = 0
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "linear", "constant"):
            raise unknown("decay", self.decay, ("cosine", "linear", "constant"))
        object.__setattr__(self, "precision", resolved_precision(self.precision))


def resolved_precision(word: str) -> str:
    """What "auto" means on this machine; any other word is returned as it is.

    bf16 pays on GPUs since compute capability 8.0 and on CPUs that multiply in it; the others emulate it slowly.
    """
    if word != "auto":
        return word
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "no"
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    arm = platform.machine() in ("arm64", "aarch64") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if arm or any(getattr(torch.cpu, name, bool)() for name in native) else "no"


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A seed for one step: distinct for every (seed, step, stream) below 2**20 seeds and 2**36 steps."""
    return (seed << 40) + (step << 3) + stream


def learning_rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then as ``decay`` says from ``lr`` to ``final_lr * lr``."""
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    if schedule.decay == "constant":
        return schedule.lr
    x = min(1.0, (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup))
    left = 1 - x if schedule.decay == "linear" else 0.5 * (1 + math.cos(math.pi * x))
    return schedule.lr * (schedule.final_lr + (1 - schedule.final_lr) * left)


class Run:
    """The state of one training run in one folder: ``checkpoint/`` (latest) and ``log.jsonl``.

    ``fit`` trains from the latest checkpoint, or from the start, to the last step. Calling it again on a finished run
    returns at once with the averaged weights loaded.

    Raises:
        BadInput: the folder holds a run with another configuration (the differing field is named).
        SfumatoError: the loss is not finite (the last good checkpoint stays).
    """

    def __init__(self, recipe: Recipe, schedule: Schedule, folder: Path, config: dict[str, Any] | None = None):
        self.recipe, self.schedule, self.folder = recipe, schedule, Path(folder)
        self.accelerator = Accelerator(mixed_precision=schedule.precision, cpu=not torch.cuda.is_available())
        device = self.accelerator.device
        self.modules = {k: m.to(device) for k, m in recipe.modules().items()}
        self.wrapped = {k: self.accelerator.prepare(m) for k, m in self.modules.items()}
        self.params = {
            f"{k}.{n}": p for k, m in self.modules.items() for n, p in m.named_parameters() if p.requires_grad
        }
        optimizer = torch.optim.AdamW(
            self.params.values(),
            lr=schedule.lr,
            betas=schedule.betas,
            eps=schedule.eps,
            weight_decay=schedule.weight_decay,
        )
        self.optimizer = self.accelerator.prepare(optimizer)
        self.average = {n: p.detach().clone() for n, p in self.params.items()}
        self.step = 0
        # The number of steps may not change either: it shapes the learning rate.
        self.config = json.loads(json.dumps({"recipe": recipe.name, **asdict(schedule), **(config or {})}))

    def fit(self, progress: bool = True) -> None:
        """Train to the last step, then put the averaged weights into the modules."""
        self.resume()
        start, began = self.step, time.perf_counter()
        with _bar(
            f"{self.recipe.name}", self.schedule.steps, start, progress and self.accelerator.is_main_process
        ) as bar:
            while self.step < self.schedule.steps:
                logs = self.one_step()
                last = self.step == self.schedule.steps
                due = last or self.step % self.schedule.checkpoint_every == 0
                if due or self.step % 20 == 0:
                    logs = {k: float(v) for k, v in logs.items()}
                    if not all(map(math.isfinite, logs.values())):
                        raise SfumatoError(
                            f"the loss is not finite at step {self.step} ({logs}); the last good checkpoint is in "
                            f"{self.folder / 'checkpoint'}: lower the learning rate and go on from there"
                        )
                    rate = (self.step - start) * self.schedule.batch / (time.perf_counter() - began)
                    self._log({"step": self.step, **logs, "pictures_per_second": round(rate, 1)})
                    bar(self.step, f"loss {logs['loss']:.4f}  {rate:.0f} pictures/s")
                if due:
                    self.save()
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(self.average[name])

    def one_step(self) -> dict[str, Tensor]:
        """One update; returns the figures to log (tensors, so that nothing waits for the device)."""
        s, i = self.schedule, self.step
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        set_seed(step_seed(s.seed, i, 2) % 2**32)  # dropout inside the networks
        batch = self.recipe.batch(i, _generator(s.seed, i * world + rank, 0), s.batch // world)
        with self.accelerator.autocast():
            loss, logs = self.recipe.loss(batch, _generator(s.seed, i * world + rank, 1))
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(list(self.params.values()), s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(s, i)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(s.ema, (1 + i) / (10 + i))
        names = list(self.params)
        torch._foreach_lerp_([self.average[n] for n in names], [self.params[n].detach() for n in names], 1 - decay)
        self.step += 1
        return {"loss": loss.detach(), "grad_norm": norm.detach(), **logs}

    def save(self) -> None:
        """Write ``checkpoint/`` under a temporary name, then swap: a kill at any moment leaves a whole one.

        Raises:
            BadInput: the disk is full; the checkpoint before stays.
        """
        if not self.accelerator.is_main_process:
            return
        new, current, old = (self.folder / n for n in ("checkpoint.new", "checkpoint", "checkpoint.old"))
        shutil.rmtree(new, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            self._write(new)
        except Exception as error:
            shutil.rmtree(new, ignore_errors=True)
            if disk_is_full(error):
                raise BadInput(
                    f"the disk is full, so no checkpoint of step {self.step} was written: free some space, and "
                    "the same command goes on from the checkpoint before"
                ) from error
            raise
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        state = self.optimizer.state_dict()["state"]
        names = list(self.params)
        save_file({n: p.detach().contiguous() for n, p in self.params.items()}, folder / "weights.safetensors")
        save_file({n: p.contiguous() for n, p in self.average.items()}, folder / "average.safetensors")
        save_file(
            {f"{names[i]}/{k}": torch.as_tensor(v).contiguous() for i, s in state.items() for k, v in s.items()},
            folder / "optimizer.safetensors",
        )
        # Written last: a folder without it is incomplete.
        (folder / "run.json").write_text(json.dumps({"step": self.step, "config": self.config}, indent=1))

    def resume(self) -> None:
        """Load the latest whole checkpoint, if there is one.

        Raises:
            BadInput: it is one of another configuration, or damaged.
        """
        found = [p for n in ("checkpoint", "checkpoint.old") if (p := self.folder / n / "run.json").exists()]
        if not found:
            return
        saved = json.loads(found[0].read_text())
        for key in sorted(self.config.keys() | saved["config"].keys()):
            ours, theirs = self.config.get(key), saved["config"].get(key)
            if ours != theirs and key != "checkpoint_every":
                raise BadInput(
                    f"{self.folder} holds a run with {key}={theirs!r}, and this one has {key}={ours!r}: "
                    "use the same setting to go on, or another folder to start anew"
                )
        folder = found[0].parent
        try:
            weights, average, moments = (
                load_file(folder / f"{n}.safetensors") for n in ("weights", "average", "optimizer")
            )
            with torch.no_grad():
                for n, p in self.params.items():
                    p.copy_(weights[n])
                    self.average[n].copy_(average[n])
        except (SafetensorError, OSError, LookupError, RuntimeError) as error:
            raise BadInput(
                f"the checkpoint in {folder} is damaged ({error}): remove {folder.parent} to start anew"
            ) from error
        self.step = saved["step"]
        state: dict[int, dict[str, Tensor]] = {}
        index = {n: i for i, n in enumerate(self.params)}
        for key, value in moments.items():
            name, field = key.rsplit("/", 1)
            state.setdefault(index[name], {})[field] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")


def _generator(seed: int, step: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(step_seed(seed, step, stream))


class _bar:
    """A rich progress bar with an honest time to finish, or silence."""

    def __init__(self, title: str, total: int, done: int, show: bool):
        self.title, self.total, self.done, self.show = title, total, done, show

    def __enter__(self):
        if not self.show:
            return lambda step, text: None
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self.progress = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=console())
        self.progress.start()
        task = self.progress.add_task(self.title, total=self.total, completed=self.done, text="")
        return lambda step, text: self.progress.update(task, completed=step, text=text)

    def __exit__(self, *error):
        if self.show:
            self.progress.stop()
