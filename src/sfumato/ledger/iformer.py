"""iFormer: its mixer against attention alone, its frequency ramp, and what the ways keep of high frequencies."""

from __future__ import annotations

from typing import Any

import torch

from sfumato.classify.iformer import InceptionTransformer
from sfumato.classify.parts.spectra import spectra

from .classifying import trained
from .core import Claim, Experiment, Figures, Found

UPDATES = 240
ARMS: dict[str, dict[str, Any]] = {
    "published": {},
    "attention": {"ramp": "attention"},
    "reversed": {"ramp": "reversed"},
}


def recipe(seed: int, updates: int, **how: Any) -> InceptionTransformer:
    """One schedule for all arms, but for what an arm says."""
    settings = {**InceptionTransformer.presets["small-pictures"], "warmup": 20, **how}
    return InceptionTransformer(
        **{**settings, "updates": updates, "batch": 32, "seed": seed, "pictures": 2500, "held_out": 0.2,
           "label_smoothing": 0.0, "mean": (0.735, 0.74, 0.73), "std": (0.29, 0.28, 0.26), "track": "none",
           "checkpoint_every": updates}
    )  # fmt: skip


def measure(seed: int, arm: str, updates: int = UPDATES) -> Figures:
    """Train one net in memory: its cross-entropy on held-out pictures, and the high shares of its ways."""
    made = trained(recipe(seed, updates, **ARMS[arm]))
    net: Any = made.net
    logits, y = [], made.labels
    with torch.no_grad():
        for x in made.pictures():
            logits.append(net(x).float().cpu())
    z = torch.cat(logits)
    told = spectra(net.net, net.seen(x))
    # the last stage's maps of 2x2 have no frequencies in between
    high = {way: [block[way]["high"] for block in told if way in block and block["stage"] < 4]
            for way in ("conv", "pool", "attention")}  # fmt: skip
    return {
        "loss": torch.nn.functional.cross_entropy(z, y, reduction="none").tolist(),
        "right": float((z.argmax(1) == y).float().mean()),
        "high": high,
    }


def compare(arms: dict[str, Figures]) -> Found:
    """The mixer against attention alone, the ramp against the reversed one, and the ways of the first arm."""
    own = arms["published"]
    high = own["high"]
    others = [(conv + pool) / 2 for conv, pool in zip(high["conv"], high["pool"], strict=True)]
    return {
        "mixer": (own["loss"], arms["attention"]["loss"]),
        "ramp": (own["loss"], arms["reversed"]["loss"]),
        "frequencies": (high["attention"], others),
        "figures": {
            arm: {"right": found["right"], "cross-entropy": sum(found["loss"]) / len(found["loss"])}
            for arm, found in arms.items()
        },
    }


LOSS = "Cross-entropy (nats) of a held-out picture."

EXPERIMENT = Experiment(
    name="iformer",
    paper="arXiv 2205.12956",
    claims={
        "mixer": Claim(
            "Convolutions and pools beside attention make a net of fewer products better than attention alone.",
            "iFormer's mixer", "attention for all channels", LOSS, "lower",
        ),
        "ramp": Claim(
            "A share of attention that rises with depth is better than one that falls.",
            "the frequency ramp", "the ramp reversed", LOSS, "lower",
        ),
        "frequencies": Claim(
            "What comes of attention has a smaller share of high frequencies than what comes of the other ways.",
            "attention", "convolution and max-pool", "Share of power above a quarter of a wave a pixel, in each block.",
            "lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned on any seed; settings as first written.",
    measure=measure,
    arms=tuple(ARMS),
    compare=compare,
    cost=100,
    notes=f"A net of 0.8 million parameters in 6 blocks, {UPDATES} updates of 32 pictures of the sketch world at 32 "
    "pixels. The paper's ablation is of iFormer-S and 100 epochs of ImageNet.",
)  # fmt: skip
