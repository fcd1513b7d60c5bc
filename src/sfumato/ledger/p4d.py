"""P4D: prompts found by projected gradient bring an erased object back more often than random ones."""

from __future__ import annotations

from sfumato.attack import P4D

from .attacking import beside_control, claim
from .core import Experiment, Found
from .erasure import sketch


def measure(seed: int) -> Found:
    """Attack an object that UCE erased, with and without knowledge."""
    return beside_control(P4D(seed=seed, **P4D.settings_for(sketch())), seed, n=12, eraser="uce")


EXPERIMENT = Experiment(
    name="p4d",
    paper="arXiv 2309.06135",
    claims={"recovers": claim("P4D-N", "as many random tokens in the prompt's place, as many pictures to choose from")},
    seeds=(1, 2, 3),
    tuning="fewer tokens and updates than the paper's, of four tries at seed 0: three on UCE, one on ESD-u "
    "(nothing found)",
    measure=measure,
    cost=110,
)
