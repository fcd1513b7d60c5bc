"""How long and how fast a run trains: the settings of the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from sfumato.errors import BadInput, unknown


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast: the settings of the loop itself.

    Whatever trains inherits them, gives its own defaults, and thereby has the flags.
    """

    updates: int
    """Updates of the weights."""
    batch: int
    """Rows in an update, over all processes."""
    lr: float
    """Highest learning rate."""
    warmup: int = 200
    """Updates of linear warm-up."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate then goes to ``final_lr`` times ``lr``; or not at all: "constant"."""
    final_lr: float = 0.02
    """Share of the learning rate that is left at the end."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decays of the averaged gradient and of its square."""
    eps: float = 1e-8
    """AdamW's constant in the denominator."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0: any."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones kept, reached gradually: min(ema, (1 + i) / (10 + i)) at update
    i; 0: the last weights are kept."""
    precision: str = "auto"
    """Mixed precision: "no", "bf16" or "fp16"; "auto" is bf16 on a GPU that has it."""
    seed: int = 0
    """Seed of all that is drawn."""
    checkpoint_every: int = 250
    """Updates between checkpoints."""
    accumulate: int = 1
    """Micro-batches in which each process works off its rows of an update, to save memory."""
    compile: bool = False
    """Compile the networks' forward passes; the first update then takes minutes."""
    grid_every: int = 0
    """Updates between pictures to look at; 0: none."""
    track: str = "auto"
    """Where to tell how it goes: "tensorboard", "wandb", ... or "none"; "auto": TensorBoard when installed."""
    workers: int = 2
    """Threads that prepare batches ahead on a GPU; on a CPU, which they would slow down, there are none."""

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "linear", "constant"):
            raise unknown("decay", self.decay, ("cosine", "linear", "constant"))
        if self.precision not in ("auto", "no", "bf16", "fp16"):
            raise unknown("precision", self.precision, ("auto", "no", "bf16", "fp16"))
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                raise BadInput(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.ema < 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"ema and betas are decays in [0, 1): got {self.ema} and {self.betas}")
        if self.accumulate > self.batch:
            raise BadInput(f"a batch of {self.batch} cannot be cut into {self.accumulate} micro-batches")

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

    warmup: int = 0
    decay: Literal["cosine", "linear", "constant"] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    """The optimiser's decays of the averaged gradient and of its square."""
    eps: float = 1e-8
    """The optimiser's constant in the denominator."""
    weight_decay: float = 0.0
    """The optimiser's weight decay."""
    clip_norm: float = 0.0
    ema: float = 0.0
    precision: str = "no"
    """Mixed precision: "no", "bf16" or "fp16"; "auto" is bf16 on a GPU that has it. What is trained is float32."""
    checkpoint_every: int = 100
    grid_every: int = field(default=0, init=False)
    """No pictures are drawn on the way."""
    track: str = "none"
    progress: bool = False
    """Show a bar."""

    def beyond(self) -> dict[str, Any]:
        return {name: value for name, value in super().beyond().items() if name != "progress"}


LEAST = {
    "updates": 0, "batch": 1, "lr": 0, "warmup": 0, "final_lr": 0, "eps": 0, "weight_decay": 0, "clip_norm": 0,
    "seed": 0, "checkpoint_every": 1, "accumulate": 1, "grid_every": 0, "workers": 0,
}  # fmt: skip
"""The smallest values that make sense."""
NEUTRAL = {"checkpoint_every", "accumulate", "compile", "grid_every", "track", "workers"}
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
