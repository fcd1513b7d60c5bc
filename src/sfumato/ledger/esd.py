"""ESD: fine-tuning towards negative guidance erases; without the cross-attention, it changes unprompted pictures."""

from __future__ import annotations

from sfumato.erase import ESDu, ESDx

from .core import Claim, Experiment, Pair
from .erasure import STEPS, concepts_of, sketch, survey


def measure(seed: int) -> dict[str, Pair]:
    """Erase one object with both variants; survey, and draw from the empty prompt."""
    concepts, pipe = concepts_of(seed), sketch()
    pipes = {
        "original": pipe,
        "x": ESDx(concepts=concepts, seed=seed, **ESDx.settings_for(pipe)).apply(pipe),
        "u": ESDu(concepts=concepts, seed=seed, **ESDu.settings_for(pipe)).apply(pipe),
    }
    seen = survey({k: pipes[k] for k in ("original", "x")}, concepts, seed=seed)
    free = {k: p.draw("", list(range(32)), sampling_steps=STEPS, cfg_scale=1.0) for k, p in pipes.items()}
    moved = {k: (free[k] - free["original"]).square().mean(dim=(1, 2, 3)).tolist() for k in ("x", "u")}
    erased, kept = seen["x"]["gone"], 1 - seen["x"]["kept"]
    n = min(len(erased), len(kept))
    return {
        "erasure": (erased, seen["original"]["gone"]),
        "selective": (erased[:n], kept[:n]),
        "unprompted": (moved["u"], moved["x"]),
    }


EXPERIMENT = Experiment(
    name="esd",
    paper="arXiv 2303.07345",
    claims={
        "erasure": Claim(
            "ESD-x erases the concept from the pictures that ask for it.",
            "ESD-x",
            "the original model",
            "Share of pictures asked for the concept in which the oracle does not find it.",
        ),
        "selective": Claim(
            "The erased concept goes from more of its pictures than other concepts go from theirs.",
            "ESD-x, the erased concept",
            "ESD-x, all other concepts",
            "Share of what was asked for that the oracle does not find (pictures paired in order, not by prompt).",
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
    "'star' (scripts/tune_sketch.py; ESD-x's on an earlier training of the model, ESD-u's from two points of the grid)",
    measure=measure,
)
