"""DreamCreature: attention pulled onto the parts makes pictures that have the parts asked for."""

from __future__ import annotations

import numpy as np
import torch

from sfumato.customize import DreamCreature
from sfumato.customize.parts.features import patches
from sfumato.customize.parts.parts import exact_matches
from sfumato.data.sketch import COLOURS, OBJECTS

from .core import Claim, Experiment, Figures, Found
from .erasure import STEPS, sketch

N = 48
ARMS = {"loss": 0.1, "none": 0.0}
"""The weight of the attention loss."""


def measure(seed: int, arm: str) -> Figures:
    """Learn the parts of pictures of few objects and colours, with or without the loss; draw each picture's parts."""
    pipe, rng = sketch(), np.random.default_rng(seed)
    objects, colours = ([str(x) for x in rng.permutation(some)[:4]] for some in (OBJECTS, COLOURS))
    prompts = [f"a {colours[i % 4]} {objects[i // 4 % 4]} on a white background" for i in range(N)]
    pictures = pipe.draw(prompts, [10_000 * seed + i for i in range(N)], sampling_steps=STEPS, batch=N)
    settings = {**DreamCreature.settings_for(pipe), "seed": seed, "attention_weight": ARMS[arm]}
    method = DreamCreature(**settings)
    dictionary, features = method.found(pictures)
    codes, absent = dictionary.codes(features), dictionary.variants
    made = method.run(pipe, pictures)
    said = [method.said("{}", code, absent, 0.0) for code in codes]
    drawn = made.draw(said, list(range(N)), sampling_steps=STEPS, batch=N)
    with torch.no_grad():
        return {"found": exact_matches(dictionary.codes(patches(drawn)), codes, absent).tolist()}


def compare(arms: dict[str, Figures]) -> Found:
    return {"parts": (arms["loss"]["found"], arms["none"]["found"])}


EXPERIMENT = Experiment(
    name="dreamcreature",
    paper="arXiv 2311.15477",
    claims={
        "parts": Claim(
            "The attention loss keeps parts apart: pictures have the variants of parts that were asked for.",
            "DreamCreature, lambda = 0.1",
            "the same training without the attention loss",
            "EMR: share of a prompt's parts whose variant is found again in the picture, by the same clusters.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="the preset 'sketch', chosen by its cost, and the weight of the SDXL script; nothing tuned",
    measure=measure,
    arms=tuple(ARMS),
    compare=compare,
    cost=180,
)
