"""What is asked of a model."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.data.cases import Cases, sketch_cases, template_cases
from sfumato.metrics.detectors import Detector


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
