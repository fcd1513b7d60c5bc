"""What is asked of a model, and who looks at the pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sfumato.data.cases import Cases, sketch_cases, template_cases
from sfumato.errors import BadInput
from sfumato.metrics.detectors import Detector, make_detector
from sfumato.pipeline import Text2Image


def detector_for(pipe: Text2Image, spec: str | os.PathLike | Detector | None, concepts: Sequence[str]) -> Detector:
    """The detector asked for; by default the one that knows the world that the model was trained on.

    Raises:
        BadInput: none was named and the model is of the world at large; or it cannot look for one of ``concepts``.
    """
    if spec is None and not pipe.vocabulary:
        raise BadInput(
            "say how to see the concept: detector=... (a transformers image classifier or a CLIP, folder or hub id); "
            "only the sketch world has an oracle"
        )
    detector = make_detector("oracle" if spec is None else spec, concepts)
    for concept in concepts:
        detector.check(concept)
    return detector


def cases_for(
    detector: Detector,
    concepts: Sequence[str],
    retain: Sequence[str] | None,
    prompts: Sequence[str] | None,
    n: int,
    n_retain: int,
    seed: int,
) -> Cases:
    """Prompts and seeds: those of the detector's world where it knows one and no ``prompts`` are given, or templates.

    Args:
        retain: what must have been kept; None: all of the detector's world but the erased concepts.
        n, n_retain: pictures for each erased concept, and for each retained one, at least.
    """
    if detector.words and prompts is None:
        return sketch_cases({c: detector.attributes(c) for c in concepts}, retain, n, n_retain, seed)
    if retain is None:
        retain = [w for known in detector.words.values() for w in known if w not in concepts]
    return template_cases(concepts, retain, prompts, n, n_retain, seed)
