"""ESD: fine-tuning towards negative guidance erases; without the cross-attention, it changes unprompted pictures."""

from __future__ import annotations

from typing import Any

from sfumato.erase import ESDu, ESDx

from .core import Claim, Experiment, Figures, Found
from .erasure import STEPS, concepts_of, sketch, survey


def measure(seed: int, arm: str) -> Figures:
    """Erase one object with one variant, or not; survey, and draw from the empty prompt."""
    concepts, pipe = concepts_of(seed), sketch()
    kinds = {"x": ESDx, "u": ESDu}
    it = kinds[arm](concepts=concepts, seed=seed, **kinds[arm].settings_for(pipe)).apply(pipe) if arm in kinds else pipe
    found: dict[str, Any] = {} if arm == "u" else survey({"it": it}, concepts, seed=seed)["it"]
    if arm in kinds:
        free = [p.draw("", list(range(32)), sampling_steps=STEPS, cfg_scale=1.0) for p in (it, pipe)]
        found["moved"] = (free[0] - free[1]).square().mean(dim=(1, 2, 3))
    return found


def compare(arms: dict[str, Figures]) -> Found:
    """The variants, with one another and with the original."""
    erased, kept = arms["x"]["gone"], [1 - share for share in arms["x"]["kept"]]
    n = min(len(erased), len(kept))
    return {
        "erasure": (erased, arms["original"]["gone"]),
        "selective": (erased[:n], kept[:n]),
        "unprompted": (arms["u"]["moved"], arms["x"]["moved"]),
    }


EXPERIMENT = Experiment(
    name="esd",
    paper="arXiv 2303.07345",
    claims={
        "erasure": Claim(
            "ESD-x erases the concept from the pictures that ask for it.",
            "ESD-x",
            "the original model",
            "Share of pictures asked for the concept in which neither oracle finds it.",
        ),
        "selective": Claim(
            "The erased concept goes from more of its pictures than other concepts go from theirs.",
            "ESD-x, the erased concept",
            "ESD-x, all other concepts",
            "Share of what was asked for that neither oracle finds (pictures paired in order, not by prompt).",
        ),
        "unprompted": Claim(
            "ESD-u moves pictures without a prompt more than ESD-x.",
            "ESD-u",
            "ESD-x",
            "Mean squared distance to the original model's picture of the same seed, empty prompt, pixels in [0, 1].",
        ),
    },
    seeds=(1, 2, 3),
    tuning="the presets 'sketch' of ESD-x and of ESD-u, each by what goes and what stays at seed 0 on "
    "'star' (`sfumato bench tune`; ESD-x's on an earlier training of the model, ESD-u's from two points of the grid)",
    measure=measure,
    arms=("x", "u", "original"),
    compare=compare,
    cost={"x": 136, "u": 52, "original": 21},
)
