"""Faster Diffusion: the UNet's encoder runs at a few key steps only, its decoder at all of them (arXiv:2312.09608)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn

from sfumato.errors import BadInput
from sfumato.fields import Natural
from sfumato.pipeline import Text2Image
from sfumato.pipeline.split import has_halves
from sfumato.pipeline.steering import Place

from .base import Patch
from .parts.propagation import Propagation

SD_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
"""The paper's key steps for Stable Diffusion, of 50; a shorter run takes those that it has."""


def key_steps(steps: int, keys: Sequence[int] = (), every: int = 0) -> list[int]:
    """The key steps of a run with that many steps: ``keys``, or every ``every``-th one, or the paper's `SD_KEYS`.

    Raises:
        BadInput: one of ``keys`` is not a step of the run.
    """
    if late := [k for k in keys if k >= steps]:
        raise BadInput(f"key step {late[0]} is out of range: this run has {steps} steps, 0 to {steps - 1}")
    if keys:
        return sorted(keys)
    return list(range(0, steps, every)) if every else [k for k in SD_KEYS if k < steps]


@dataclass(frozen=True, kw_only=True)
class FasterDiffusion(Patch):
    """Encoder propagation (arXiv:2312.09608): from one key step to the next the decoder reuses the encoder's features.

    With E the UNet's encoder and middle block and D its decoder, step i predicts D(E(z_k, t_k, c), t_i, c), where k is
    the last key step up to i (E's output includes ControlNet's residuals). Between key steps the prediction does not
    depend on its own latent, so the decoders of all steps up to the next key step run as one batch (``mode``
    "parallel"); guidance and the scheduler's updates follow one by one. Where t_i is below ``threshold``, the noise
    that the run started from is injected before the update: z_i <- z_i + alpha z_0, at every such step.

    Works with any scheduler and batch size, with and without guidance, and with prompts that change during the run. A
    step whose batch differs from its key step's (guidance that ends half-way) is computed in full. Needs a UNet. A
    ControlNet in the pipeline runs at key steps only.

    Cost: the encoder's share of the network's operations times the share of steps that are not key steps is saved, 27 %
    of Stable Diffusion with 9 key steps of 50. The parallel mode gains further where small batches leave the
    hardware idle, and takes memory in proportion to the longest gap between key steps: see ``chunk``.

    Differs from the paper's code: network inputs are scaled as the scheduler says; serial and parallel mode give the
    same pictures (the code injects before the network's call in its serial mode: ``inject`` "network", and before the
    update in its parallel mode); the injected noise has the variance-preserving scale, whatever the scheduler's own.
    DiT, which the paper splits by its blocks, is not split here.
    """

    NEUTRAL: ClassVar[Mapping[str, Any]] = {"every": 1, "alpha": 0.0}
    """Every step is a key step, and no noise is injected."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "uniform": {"every": 4},
        "if-1": {"keys": tuple(i for i in range(100) if i < 10 or i > 85 or i % 5 == 0), "alpha": 0.0},
        "if-2": {"keys": tuple(i for i in range(50) if i < 20 or i > 40 or i % 2 == 0), "alpha": 0.0},
        "if-3": {"keys": tuple(i * (i + 3) // 2 for i in range(11)), "alpha": 0.0},
        "ldm-250": {
            "keys": (0, 1, 2, 3, 4, 5, 10, 25, 55, 85, 110, 135, 155, 160, 185, 195, 235, 248, 249),
            "threshold": 0.15,
        },
    }
    """Settings by name: the paper's for Stable Diffusion (the defaults); what its authors advise for fine-tunes of it;
    their key steps for the three stages of DeepFloyd IF (of 100, 50 and 75 steps) and for a class-conditional latent
    model (of 250; there they inject the noise after the update)."""

    place: ClassVar[Place] = "features"

    keys: tuple[int, ...] = ()
    """Key steps, from 0; none is the paper's list for Stable Diffusion, cut to the steps of the run."""
    every: Natural = 0
    """Make every that-many-th step a key step instead; 1 is all of them."""
    mode: Literal["parallel", "serial"] = "parallel"
    """Decode the steps between two key steps in one batch, or one after the other."""
    chunk: Natural = 0
    """In parallel mode, steps decoded in one batch at most; 0 is no limit."""
    alpha: float = 0.003
    """Strength of the injected noise; 0 is none."""
    threshold: float = 0.5
    """Inject at timesteps below this share of the training timesteps."""
    inject: Literal["update", "network"] = "update"
    """Inject before the scheduler's update only, or so early that the network at a key step sees it too."""

    def __post_init__(self) -> None:
        keys = (self.keys,) if isinstance(self.keys, (int, float)) else tuple(self.keys)
        object.__setattr__(self, "keys", keys)
        super().__post_init__()
        if keys and self.every:
            raise BadInput("give key steps or every, not both")
        if keys and (min(keys) < 0 or 0 not in keys):
            raise BadInput(f"key steps count from 0 and must include it: got {', '.join(map(str, keys))}")
        if len(set(keys)) < len(keys):
            raise BadInput(f"a key step is named twice: {', '.join(map(str, keys))}")

    @classmethod
    def fits(cls, network: nn.Module | None) -> bool:
        return has_halves(network)

    @contextmanager
    def acting(self, p: Text2Image) -> Iterator[dict[str, Any]]:
        keys = partial(key_steps, keys=self.keys, every=self.every)
        ahead = 1 if self.mode == "serial" else self.chunk
        propagation = Propagation(keys, ahead, self.alpha, self.threshold, self.inject == "network")
        with p.intercept(propagation, self.place):
            yield propagation.told
