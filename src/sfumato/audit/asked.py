"""What is asked of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sfumato.data.cases import Cases, sketch_cases, template_cases
from sfumato.data.languages import language_cases, language_file, read_languages
from sfumato.errors import BadInput
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

    A file in the place of prompts has a row for each language in which the concept is asked for (see
    `sfumato.data.languages`), ``n`` pictures in each.

    Args:
        retain: what must have been kept; None: all of the detector's world but the erased concepts.
        n, n_retain: pictures for each erased concept, and for each retained one, at least.
    """
    if (file := language_file(prompts)) is not None:
        if len(concepts) != 1:
            raise BadInput(f"{file} says how one concept is called in several languages: audit one concept at a time")
        rows = language_cases(concepts[0], read_languages(file), n, seed)
        return replace(cases_for(detector, concepts, retain, None, n, n_retain, seed), targets={concepts[0]: rows})
    if detector.words and prompts is None:
        retain = None if retain is None else [_single(detector, word) for word in retain]
        if both := next((word for word in retain or () if word in concepts), None):
            raise BadInput(f"{both!r} cannot be both erased and retained")
        return sketch_cases({c: detector.attributes(c) for c in concepts}, retain, n, n_retain, seed)
    if retain is None:
        retain = [w for known in detector.words.values() for w in known if w not in concepts]
    return template_cases(concepts, retain, prompts, n, n_retain, seed)


def _single(detector: Detector, word: str) -> str:
    """A word to retain, as the detector's world writes it."""
    found = list(detector.attributes(word).values())
    if len(found) != 1:
        raise BadInput(f"{word!r} names {len(found)} things: retain single words of the detector's world")
    return found[0]
