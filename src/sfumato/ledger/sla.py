"""SLA with few labels: its answers against augmentation, two tasks, and the plain labels."""

from __future__ import annotations

from typing import Any

import torch

from sfumato.classify.sla import SLA

from .classifying import trained
from .core import Claim, Experiment, Figures, Found

UPDATES = 300
BATCH = 16
ARMS: dict[str, dict[str, Any]] = {
    "sla": {"objective": "sla+sd"},
    "da": {"objective": "da"},
    "mt": {"objective": "mt"},
    "plain": {"objective": "plain"},
    "plain, as many pictures": {"objective": "plain", "batch": 4 * BATCH},
}


def recipe(seed: int, updates: int, **how: Any) -> SLA:
    """One network and one schedule for all arms, but for what an arm says."""
    settings = {**SLA.presets["small-run"], "warmup": 20, "updates": updates, "batch": BATCH, **how}
    return SLA(
        **{**settings, "widths": (32, 64, 128), "seed": seed, "pictures": 1500, "held_out": 0.8, "track": "none",
           "checkpoint_every": updates}
    )  # fmt: skip


def measure(seed: int, arm: str, updates: int = UPDATES) -> Figures:
    """Train one network in memory; which held-out pictures are told right, by every mode."""
    made = trained(recipe(seed, updates, **ARMS[arm]))
    net: Any = made.net
    right: dict[str, Any] = {}
    for mode in net.modes:
        net.mode = mode
        with torch.no_grad():
            parts = [net(x).argmax(1).cpu() for x in made.pictures()]
        right[mode] = (torch.cat(parts) == made.labels).float().tolist()
    return right


def compare(arms: dict[str, Figures]) -> Found:
    """SLA's answers against the baselines', picture by picture."""
    sla, da, plain = arms["sla"], arms["da"], arms["plain"]
    return {
        "aggregate": (sla["aggregate"], da["aggregate"]),
        "copies": (sla["aggregate"], sla["single"]),
        "distilled": (sla["distilled"], plain["single"]),
        "at equal pictures": (sla["distilled"], arms["plain, as many pictures"]["single"]),
        "invariance": (da["single"], plain["single"]),
        "figures": {
            arm: {mode: sum(right) / len(right) for mode, right in found.items()} for arm, found in arms.items()
        },
    }


RIGHT = "Whether a held-out picture is told right (1) or not (0)."

EXPERIMENT = Experiment(
    name="sla",
    paper="arXiv 1910.05872",
    claims={
        "aggregate": Claim(
            "With few labels, the mean over copies of joint logits is right more often than that of one head trained "
            "with the same copies as augmentation.",
            "SLA, aggregated", "augmentation, the same copies at test time", RIGHT,
        ),
        "copies": Claim(
            "The aggregate is right more often than the picture alone.", "SLA, aggregated", "SLA, single", RIGHT,
        ),
        "distilled": Claim(
            "With few labels, the taught head, which sees one copy, is right more often than plain training.",
            "SLA, distilled", "plain labels", RIGHT,
        ),
        "at equal pictures": Claim(
            "It is so too where plain training sees as many pictures in an update as SLA does copies.",
            "SLA, distilled", "plain labels, four times the batch", RIGHT,
        ),
        "invariance": Claim(
            "Rotations as augmentation make a classifier right less often than none.",
            "augmentation", "plain labels", RIGHT, "lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned on any seed; settings as first written.",
    measure=measure,
    arms=tuple(ARMS),
    compare=compare,
    cost={"sla": 65, "da": 60, "mt": 60, "plain": 25, "plain, as many pictures": 60},
    notes=f"A ResNet of three levels, {UPDATES} updates (AdamW) of {BATCH} pictures, each turned four ways, of the "
    "sketch world at 32 pixels, 300 of them labelled; measured on 1200 others.",
)  # fmt: skip
