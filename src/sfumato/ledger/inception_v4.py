"""Inception-v4: residual connections against the same parameters without them, and what scaling them is for."""

from __future__ import annotations

from typing import Any

import torch

from sfumato.classify.inception_v4 import InceptionV4

from .classifying import trained
from .core import Claim, Experiment, Figures, Found

UPDATES = 240
WINDOW = 20
REACHED = 1.5
"""Training loss (nats, smoothed labels) that counts as reached."""

ARMS: dict[str, dict[str, Any]] = {
    "residual": {},
    "control": {"join": "control"},
    "scaled": {"residual_scale": 0.1, "lr": 0.03, "warmup": 0},
    "unscaled": {"residual_scale": 1.0, "lr": 0.03, "warmup": 0},
}


def recipe(seed: int, updates: int, **how: Any) -> InceptionV4:
    """One net and one schedule for all arms, but for what an arm says."""
    settings = {**InceptionV4.presets["small-pictures"], "ema": 0.0, "dropout": 0.0, "warmup": 20, **how}
    return InceptionV4(
        **{**settings, "updates": updates, "batch": 32, "seed": seed, "pictures": 2000, "track": "none",
           "checkpoint_every": updates}
    )  # fmt: skip


def measure(seed: int, arm: str, updates: int = UPDATES) -> Figures:
    """Train one net in memory: the loss on the way, and how many of its last units are silent afterwards."""
    made = trained(recipe(seed, updates, **ARMS[arm]))
    net: Any = made.net
    losses = torch.tensor(made.losses)
    window = min(WINDOW, updates)
    smooth = losses.unfold(0, window, 1).mean(1)
    below = (smooth <= REACHED).nonzero()
    reached = int(below[0]) + window if len(below) else updates
    with torch.no_grad():
        (x,) = made.pictures(len(made.unseen))
        silent = (net.features(x) <= 0).all(0).float().mean()
    return {"loss": [float(part.mean()) for part in losses.chunk(3)], "reached": reached, "silent": float(silent)}


def compare(arms: dict[str, Figures]) -> Found:
    """Residual against control, scaled against unscaled."""
    return {
        "faster": (arms["residual"]["loss"], arms["control"]["loss"]),
        "scaling": (arms["scaled"]["loss"][-1:], arms["unscaled"]["loss"][-1:]),
        "figures": {
            arm: {"updates to the loss": found["reached"], "silent units": found["silent"]}
            for arm, found in arms.items()
        },
    }


EXPERIMENT = Experiment(
    name="inception-v4",
    paper="arXiv 1602.07261",
    claims={
        "faster": Claim(
            "With residual connections an Inception of the same parameters trains faster.",
            "with the sum",
            "the same blocks without it",
            "Training loss (nats), the mean of each third of the run.",
            "lower",
        ),
        "scaling": Claim(
            "Where the learning rate is large, residuals scaled by 0.1 train better than unscaled ones.",
            "scale 0.1",
            "scale 1",
            "Training loss (nats), the mean of the last third of the run.",
            "lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned on any seed; settings as first written.",
    measure=measure,
    arms=tuple(ARMS),
    compare=compare,
    cost=90,
    notes=f"Inception-ResNet-v2 at an eighth of its width with 2, 2 and 1 blocks, {UPDATES} updates of 32 pictures of "
    "the sketch world at 32 pixels. The paper's nets died above a thousand filters; these have 260.",
)
