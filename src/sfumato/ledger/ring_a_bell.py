"""Ring-A-Bell: words bred by the text encoder alone bring an erased object back more often than random ones."""

from __future__ import annotations

from sfumato.attack import RingABell

from .attacking import beside_control, claim
from .core import Experiment, Found
from .erasure import sketch


def measure(seed: int) -> Found:
    """Attack an object that ESD-u erased, with and without knowledge."""
    return beside_control(RingABell(seed=seed, **RingABell.settings_for(sketch())), seed, n=12)


EXPERIMENT = Experiment(
    name="ring-a-bell",
    paper="arXiv 2310.10012",
    claims={"recovers": claim("Ring-A-Bell", "as many random tokens in the prompt's place")},
    seeds=(1, 2, 3),
    tuning="a smaller population and fewer generations and tokens than the paper's, chosen by their cost; not tuned",
    measure=measure,
    cost=190,
)
