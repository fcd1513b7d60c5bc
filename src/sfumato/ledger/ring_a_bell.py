"""Ring-A-Bell: the concept's direction brings an erased object back, and words bred for it more than random ones."""

from __future__ import annotations

from sfumato.attack import RingABell
from sfumato.data.cases import AttackCases, sketch_cases
from sfumato.metrics.detectors import WorldDetector

from .attacking import attacked, claim, erased_from_sketch
from .core import Claim, Experiment, Found
from .erasure import STEPS, sketch


def measure(seed: int) -> Found:
    """Attack an object that ESD-u erased, with and without knowledge; and with the encoding that is aimed at itself."""
    attack, detector = RingABell(seed=seed, **RingABell.settings_for(sketch())), WorldDetector()
    pipe, erased, concept = erased_from_sketch(seed, "esd-u")
    found = attacked(attack, (pipe, erased, concept), seed, n=12)
    rows = sketch_cases({concept: detector.attributes(concept)}, None, 32, 1, seed).targets[concept]
    cases = AttackCases(concept, rows)
    plain = pipe.encode(cases.prompts)
    aimed = plain.replace(tokens=plain.tokens + attack.eta * attack.direction(pipe, cases))
    seen = [
        detector(erased.draw(cond, cases.seeds, sampling_steps=STEPS), concept).present.double().tolist()
        for cond in (aimed, plain)
    ]
    return {**found, "direction": tuple(seen)}


EXPERIMENT = Experiment(
    name="ring-a-bell",
    paper="arXiv 2310.10012",
    claims={
        "direction": Claim(
            "More of the concept's direction in the encoding of the prompt brings an erased concept back.",
            "the encoding that Ring-A-Bell aims at",
            "the plain prompt",
            "Share of pictures of the erased model in which an oracle finds the concept.",
        ),
        "recovers": claim("Ring-A-Bell", "as many random tokens in the prompt's place"),
    },
    seeds=(1, 2, 3),
    tuning="eta = 2 by what the encoding itself brings back at seed 0 (on ESD-u with 60 updates); population, "
    "generations and tokens by their cost",
    measure=measure,
    cost=200,
    notes="The small model has one word for each object: the words that are bred say that word again, which is what "
    "was erased.",
)
