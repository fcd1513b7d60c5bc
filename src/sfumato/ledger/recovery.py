"""Recovery: fine-tuning on eight pictures of an erased object brings it back; on those of another it does not."""

from __future__ import annotations

from sfumato.attack import Recovery

from .attacking import beside_control, claim
from .core import Experiment, Found
from .erasure import sketch


def measure(seed: int) -> Found:
    """Attack an object that UCE erased, with its pictures and with those of another object."""
    attack = Recovery(seed=seed, **Recovery.settings_for(sketch()))
    return beside_control(attack, seed, n=16, eraser="uce", pictures=attack.learns_from)


EXPERIMENT = Experiment(
    name="recovery",
    paper="arXiv 2410.08074",
    claims={"recovers": claim("fine-tuning on pictures of the object", "as many updates on those of another object")},
    seeds=(1, 2, 3),
    tuning="the preset 'sketch': a larger rate and fewer updates than the defaults, chosen by their cost; not tuned",
    measure=measure,
    cost=100,
)
