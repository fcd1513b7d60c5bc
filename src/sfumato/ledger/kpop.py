"""KPOP: without its key a concept is gone, with its key it is back, and another concept's key does not fit."""

from __future__ import annotations

from dataclasses import replace

from sfumato.erase import KPOP
from sfumato.pipeline.keys import attach

from .core import Claim, Experiment, Figures, Found
from .erasure import concepts_of, sketch, survey


def measure(seed: int, arm: str) -> Figures:
    """Hide two objects; draw them without keys, with their own, and each with the other's."""
    concepts, pipe = concepts_of(seed, 2), sketch()
    look = lambda it: survey({"it": it}, concepts, seed=seed, n=24, n_retain=2)["it"]["gone"]
    if arm == "original":
        return {"gone": look(pipe)}
    settings = KPOP.settings_for(pipe)
    more = {**settings, "updates": settings["updates"] * 3 // 2}
    hidden, keys, _ = KPOP(concepts=concepts, seed=seed, **more).train(pipe)
    crossed = [replace(key, concept=other.concept) for key, other in zip(keys, keys[::-1], strict=True)]
    found = {"hidden": hidden, "right": attach(hidden, keys), "wrong": attach(hidden, crossed)}
    return {name: look(it) for name, it in found.items()}


def compare(arms: dict[str, Figures]) -> Found:
    """Hidden against original, with the key against without, the right key against the wrong one."""
    kpop = arms["KPOP"]
    seen = {name: [1 - gone for gone in kpop[name]] for name in ("hidden", "right", "wrong")}
    return {
        "hidden": (kpop["hidden"], arms["original"]["gone"]),
        "recovery": (seen["right"], seen["hidden"]),
        "secret": (seen["right"], seen["wrong"]),
    }


EXPERIMENT = Experiment(
    name="kpop",
    paper="arXiv 2403.12326",
    claims={
        "hidden": Claim(
            "Without the key the concepts are gone from the pictures that ask for them.",
            "KPOP, no key",
            "the original model",
            "Share of pictures asked for a concept in which neither oracle finds it.",
        ),
        "recovery": Claim(
            "A concept's key brings it back.",
            "KPOP, its key attached",
            "KPOP, no key",
            "Share of pictures asked for a concept in which an oracle finds it.",
        ),
        "secret": Claim(
            "Another concept's key does not.",
            "KPOP, its key attached",
            "KPOP, the other concept's key attached",
            "Share of pictures asked for a concept in which an oracle finds it.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="the preset 'sketch', of which one point was tried, at seed 0 on 'star', with 60 updates: the weights' rate "
    "and updates are those of ESD-x's preset, the prompts' rate ten times that; half as many updates more, because two "
    "concepts share them",
    measure=measure,
    arms=("KPOP", "original"),
    compare=compare,
    cost={"KPOP": 300, "original": 20},
)
