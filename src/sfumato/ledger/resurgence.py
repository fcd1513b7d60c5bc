"""Resurgence: erased objects come back when the model is fine-tuned on pictures of other things."""

from __future__ import annotations

from typing import Any

from sfumato.audit.chain import Chained, FineTune, Given
from sfumato.data.cases import sketch_cases
from sfumato.metrics.detectors import WorldDetector

from .attacking import erased_from_sketch
from .core import Claim, Experiment, Found
from .erasure import survey


def measure(seed: int) -> Found:
    """Fine-tune two erased models on the original's pictures of all other words, and look for the object again."""
    found: dict[str, Any] = {}
    for eraser in ("uce", "esd-u"):
        pipe, erased, concept = erased_from_sketch(seed, eraser)
        asked = {concept: WorldDetector().attributes(concept)}
        prompts = [case.prompt for case in sketch_cases(asked, None, 1, 4, 1000 + seed).retained]
        link = FineTune(**{**FineTune.settings_for(pipe), "seed": seed})
        tuned = link.act(Chained(erased), Given(pipe, (concept,), prompts)).pipe
        seen = survey({"before": erased, "after": tuned}, [concept], seed=seed, n=32, n_retain=2)
        found |= {eraser: (1 - seen["after"]["gone"], 1 - seen["before"]["gone"])}
        found |= {f"kept, {eraser}": {k: {"kept": float(v["kept"].mean())} for k, v in seen.items()}}
    return found


def claim(eraser: str) -> Claim:
    return Claim(
        "An erased concept comes back when the model is fine-tuned on pictures of other things.",
        f"{eraser}, then fine-tuned",
        f"{eraser}",
        "Share of pictures asked for the object in which an oracle finds it.",
    )


EXPERIMENT = Experiment(
    name="resurgence",
    paper="arXiv 2410.08074",
    claims={"uce": claim("UCE"), "esd-u": claim("ESD-u")},
    seeds=(1, 2, 3),
    tuning="the preset 'sketch' of the link: rate and updates of the ledger's entry on recovery, not tuned",
    measure=measure,
    cost=170,
    notes="The paper fine-tunes Stable Diffusion on unrelated pictures for hundreds of steps; here it is the embedded "
    "model, on 64 pictures that the original draws of all other words.",
)
