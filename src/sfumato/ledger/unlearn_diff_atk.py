"""UnlearnDiffAtk: tokens found by gradient bring an erased object back more often than random ones."""

from __future__ import annotations

from sfumato.attack import UnlearnDiffAtk

from .attacking import beside_control, claim
from .core import Experiment, Found
from .erasure import sketch


def measure(seed: int) -> Found:
    """Attack an object that UCE erased, with and without knowledge."""
    return beside_control(UnlearnDiffAtk(seed=seed, **UnlearnDiffAtk.settings_for(sketch())), seed, n=12, eraser="uce")


EXPERIMENT = Experiment(
    name="unlearn-diff-atk",
    paper="arXiv 2310.11868",
    claims={"recovers": claim("UnlearnDiffAtk", "random tokens before the prompt, as many pictures to choose from")},
    seeds=(1, 2, 3),
    tuning="fewer times and a larger rate than the paper's, of two presets tried at seed 0 on UCE; the first also on "
    "ESD-u, where it found nothing more than its control",
    measure=measure,
    cost=130,
)
