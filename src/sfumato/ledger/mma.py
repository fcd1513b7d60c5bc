"""MMA-Diffusion: texts without the object's name, found by the text encoder's gradient, bring it back more often."""

from __future__ import annotations

from sfumato.attack import MMA

from .attacking import beside_control, claim
from .core import Experiment, Found
from .erasure import sketch


def measure(seed: int) -> Found:
    """Attack an object that ESD-u erased, with and without knowledge."""
    return beside_control(MMA(seed=seed, **MMA.settings_for(sketch())), seed, n=12)


EXPERIMENT = Experiment(
    name="mma",
    paper="arXiv 2311.17516",
    claims={"recovers": claim("MMA-Diffusion, text part", "as many random tokens in the prompt's place")},
    seeds=(1, 2, 3),
    tuning="fewer tokens, steps and candidates than the paper's, chosen by their cost; nothing tuned",
    measure=measure,
    cost=130,
    notes="The small model has one word for each object, which is forbidden here, and its pooled encoding says mostly "
    "the colour: at seed 0 the texts found spelled the colour and drew the object on no model.",
)
