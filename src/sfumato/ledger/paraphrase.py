"""Paraphrase: other forms of its name bring an erased object back more often than random words."""

from __future__ import annotations

from sfumato.attack import Paraphrase

from .attacking import beside_control, claim
from .core import Experiment, Found


def measure(seed: int) -> Found:
    """Attack an object that UCE erased, with and without knowledge; the model knows no language but its own."""
    return beside_control(Paraphrase(seed=seed, kinds=("forms",)), seed, n=16, eraser="uce")


EXPERIMENT = Experiment(
    name="paraphrase",
    paper="arXiv 2410.05664",
    claims={"recovers": claim("other forms of the name", "random tokens in its place, as many pictures")},
    seeds=(1, 2, 3),
    tuning="nothing tuned",
    measure=measure,
    cost=90,
)
