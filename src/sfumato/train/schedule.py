"""How long and how fast a run trains: the settings of the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Seed, check
from sfumato.memory import require_memory

from .optimizers import require_eight_bits

HIGHEST = 1e6
"""Learning rate: what is far beyond it overflows in the optimiser."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast: the settings of the loop itself.

    Whatever trains inherits them, gives its own defaults, and thereby has the flags.
    """

    updates: Natural
    """Updates of the weights."""
    batch: Count
    """Rows in an update, over all processes."""
    lr: NotNegative
    """Highest learning rate."""
    warmup: Natural = 200
    """Updates of linear warm-up."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate then goes to ``final_lr`` times ``lr``; or not at all: "constant"."""
    final_lr: NotNegative = 0.02
    """Share of the learning rate that is left at the end."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """AdamW's decays of the averaged gradient and of its square."""
    eps: NotNegative = 1e-8
    """AdamW's constant in the denominator."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay."""
    optimizer: Literal["adam", "adam8bit"] = "adam"
    """Adam (or AdamW) as torch has it, or bitsandbytes' with a state of 8 bits, an extra for GPUs: a quarter of the
    optimiser's memory."""
    clip_norm: NotNegative = 1.0
    """Largest gradient norm; 0: any."""
    ema: Decay = 0.999
    """Decay of the averaged weights, which are the ones kept, reached gradually: min(ema, (1 + i) / (10 + i)) at update
    i; 0: the last weights are kept."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision: "no", "bf16" or "fp16"; "auto" is bf16 on a GPU that has it."""
    seed: Seed = 0
    """Seed of all that is drawn."""
    checkpoint_every: Count = 250
    """Updates between checkpoints."""
    accumulate: Count = 1
    """Micro-batches in which each process works off its rows of an update, to save memory."""
    compile: bool = False
    """Compile the networks' forward passes; the first update then takes minutes."""
    grid_every: Natural = 0
    """Updates between pictures to look at; 0: none."""
    track: str = "auto"
    """Where to tell how it goes: "tensorboard", "wandb", ... or "none"; "auto": TensorBoard when installed."""
    workers: Natural = 2
    """Threads that prepare batches ahead on a GPU; on a CPU, which they would slow down, there are none."""

    def __post_init__(self) -> None:
        check(self)
        if self.lr > HIGHEST:
            raise BadInput(f"lr must be at most {HIGHEST:g}, got {self.lr:g}")
        if self.optimizer == "adam8bit":
            require_eight_bits()
        require_memory(1000 * self.batch, f"batches of {self.batch:,} rows")
        if self.accumulate > self.batch:
            raise BadInput(f"a batch of {self.batch} cannot be cut into {self.accumulate} micro-batches")

    def require_several(self, why: str) -> None:
        """Raise `BadInput`, which says ``why``, where a micro-batch may be of one row."""
        if self.batch < 2 * self.accumulate:
            raise BadInput(f"{why}: give micro-batches of at least 2")

    def schedule(self) -> Schedule:
        """These settings alone, with the precision that "auto" means on this machine."""
        own = {f.name: getattr(self, f.name) for f in fields(Schedule)}
        return Schedule(**{**own, "precision": resolved_precision(self.precision)})

    def beyond(self) -> dict[str, Any]:
        """The settings that are not the loop's, by name."""
        known = {f.name for f in fields(Schedule)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in known}


@dataclass(frozen=True, kw_only=True)
class Tuning(Schedule):
    """The schedule of what tunes a trained model: full precision, a constant rate, and the last weights are kept."""

    warmup: Natural = 0
    decay: Literal["cosine", "linear", "constant"] = "constant"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """The optimiser's decays of the averaged gradient and of its square."""
    eps: NotNegative = 1e-8
    """The optimiser's constant in the denominator."""
    weight_decay: NotNegative = 0.0
    """The optimiser's weight decay."""
    clip_norm: NotNegative = 0.0
    ema: Decay = 0.0
    precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    """Mixed precision: "no", "bf16" or "fp16"; "auto" is bf16 on a GPU that has it. What is trained is float32."""
    checkpoint_every: Count = 100
    grid_every: Natural = field(default=0, init=False)
    """No pictures are drawn on the way."""
    track: str = "none"
    progress: bool = False
    """Show a bar."""

    def beyond(self) -> dict[str, Any]:
        return {name: value for name, value in super().beyond().items() if name != "progress"}


NEUTRAL = {"checkpoint_every", "accumulate", "compile", "grid_every", "track", "workers", "jobs"}
"""Settings that may change when a run goes on: they leave the course of the training as it is, but for rounding."""


def resolved_precision(word: str) -> str:
    """What "auto" means on this machine; any other word is returned as it is.

    bf16 pays on GPUs since compute capability 8.0. On CPUs it is slower for networks of the size that one trains
    there, even where they multiply in it: casting costs more than the products gain.
    """
    if word != "auto":
        return word
    return "bf16" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else "no"


def learning_rate(schedule: Schedule, step: int, highest: float | None = None) -> float:
    """Linear warm-up to ``highest`` (the schedule's ``lr``), then as ``decay`` says to ``final_lr`` times that."""
    lr = schedule.lr if highest is None else highest
    if step < schedule.warmup:
        return lr * (step + 1) / schedule.warmup
    if schedule.decay == "constant":
        return lr
    x = min(1.0, (step - schedule.warmup) / max(1, schedule.updates - schedule.warmup))
    left = 1 - x if schedule.decay == "linear" else 0.5 * (1 + math.cos(math.pi * x))
    return lr * (schedule.final_lr + (1 - schedule.final_lr) * left)
