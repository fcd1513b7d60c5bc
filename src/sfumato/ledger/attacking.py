"""What ledger entries about attacks share: an erased pipeline, its cases, and an attack beside its control."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from sfumato.attack.base import Attack
from sfumato.data.cases import AttackCases, sketch_cases
from sfumato.data.sketch import BACKGROUNDS, COLOURS, OBJECTS, STYLES
from sfumato.erase import UCE, ESDu
from sfumato.metrics.detectors import WorldDetector
from sfumato.pipeline import Text2Image

from .core import Claim, Found
from .erasure import STEPS, concepts_of, sketch


def claim(attack: str, control: str) -> Claim:
    """That an attack recovers more than its control."""
    return Claim(
        "The attack brings an erased concept back more often than the same effort without knowledge of it.",
        attack,
        control,
        "Share of pictures in which an oracle finds the concept, of cases whose plain prompts do not show it.",
    )


def erased_from_sketch(seed: int, eraser: Literal["uce", "esd-u"]) -> tuple[Text2Image, Text2Image, str]:
    """(the embedded pipeline, the same with one object erased, that object).

    UCE, with all other words preserved, takes the word itself out of the network: nothing that says it through the
    text encoder reaches further. ESD-u, what the papers on prompts attack, leaves cross-attention as it is.
    """
    (concept,), pipe = concepts_of(seed), sketch()
    if eraser == "esd-u":
        return pipe, ESDu(concepts=(concept,), seed=seed, **ESDu.settings_for(pipe)).apply(pipe), concept
    words = tuple(w for w in (*OBJECTS, *COLOURS, *BACKGROUNDS, *STYLES) if w != concept)
    return pipe, UCE(concepts=(concept,), preserve=words).apply(pipe), concept


def beside_control(
    attack: Attack, seed: int, n: int, eraser: Literal["uce", "esd-u"] = "esd-u", pictures: int = 0
) -> Found:
    """Attack an erased pipeline with and without knowledge; per case whether the concept is in the picture.

    Cases that their plain prompts show are left out, and told in a table of their own.

    Args:
        n: cases.
        pictures: of the concept (and of the control's), drawn by the original, for attacks that learn from some.
    """
    return attacked(attack, erased_from_sketch(seed, eraser), seed, n, pictures)


def attacked(attack: Attack, on: tuple[Text2Image, Text2Image, str], seed: int, n: int, pictures: int = 0) -> Found:
    """`beside_control` on what `erased_from_sketch` gives."""
    (pipe, erased, concept), detector = on, WorldDetector()
    other = next(o for o in OBJECTS if o != concept)

    def given(word: str) -> AttackCases:
        cases = sketch_cases({word: detector.attributes(word)}, None, n + pictures, 1, seed).targets[word]
        asked = AttackCases(word, cases[:n], drawing={"sampling_steps": STEPS})
        if not pictures:
            return asked
        captions = [case.prompt for case in cases[n:]]
        drawn = pipe.draw(captions, [10_000 * seed + i for i in range(pictures)], sampling_steps=STEPS)
        return AttackCases(word, cases[:n], drawn, captions, {"sampling_steps": STEPS})

    cases = given(concept)
    means: dict[str, Any] = {"judge": detector, "original": pipe, "progress": False}
    found = attack.run(erased, cases, **means)
    floor = attack.control(erased, cases, given(other), **means)
    before = detector(erased.draw(cases.prompts, cases.seeds, sampling_steps=STEPS), concept).present.numpy()
    seen = [
        detector(one.draw(erased, cases.prompts, cases.seeds, sampling_steps=STEPS), concept).present.numpy()
        for one in (found, floor)
        if one is not None
    ]
    closed = ~before if (~before).any() else np.ones_like(before)
    spent = found.spent or {"rows": float("nan"), "seconds": float("nan")}
    about = {"before": float(before.mean()), "rows": float(spent["rows"]), "seconds": float(spent["seconds"])}
    return {"recovers": (seen[0][closed].astype(float), seen[1][closed].astype(float)), "search": {"attack": about}}
