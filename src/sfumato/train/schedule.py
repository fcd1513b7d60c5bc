"""How long and how fast a run trains: the settings of the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sfumato.errors import BadInput, unknown


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: the settings of the loop itself."""

    steps: int
    batch: int
    """Rows in an update, over all processes."""
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
    """"no", "bf16" or "fp16": accelerate's mixed precision; "auto": bf16 on a GPU that has it, else no."""
    seed: int = 0
    checkpoint_every: int = 250
    accumulate: int = 1
    """Micro-batches in which each process works off its rows of an update."""
    compile: bool = False
    """Compile the networks' forward passes; the first step then takes minutes."""
    grid_every: int = 0
    """Steps between pictures of the recipe's ``grid``; 0: none."""
    track: str = "auto"
    """A tracker that accelerate knows ("tensorboard", "wandb", ...), "none", or "auto": TensorBoard when installed."""
    workers: int = 2
    """Threads that prepare batches ahead on a GPU; on a CPU, which they would slow down, there are none."""

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "linear", "constant"):
            raise unknown("decay", self.decay, ("cosine", "linear", "constant"))
        if self.accumulate < 1 or self.batch < self.accumulate:
            raise BadInput(f"a batch of {self.batch} cannot be cut into {self.accumulate} micro-batches")
        object.__setattr__(self, "precision", resolved_precision(self.precision))


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


def learning_rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then as ``decay`` says from ``lr`` to ``final_lr * lr``."""
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    if schedule.decay == "constant":
        return schedule.lr
    x = min(1.0, (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup))
    left = 1 - x if schedule.decay == "linear" else 0.5 * (1 + math.cos(math.pi * x))
    return schedule.lr * (schedule.final_lr + (1 - schedule.final_lr) * left)
