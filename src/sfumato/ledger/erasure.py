"""What ledger entries about erasing share: drawing the same cases from several pipelines and reading them off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool2d

from sfumato.audit.integrity import distances
from sfumato.data import oracle as oracles
from sfumato.data.cases import sketch_cases
from sfumato.data.sketch import OBJECTS
from sfumato.metrics.detectors import WorldDetector
from sfumato.metrics.perceptual import oracle_distance
from sfumato.pipeline import Text2Image, load_text2image

STEPS = 15
"""Denoising steps of a picture: enough for the oracle, and the same for all that is compared."""


@cache
def sketch() -> Text2Image:
    """The embedded pipeline."""
    return load_text2image("sketch")


def concepts_of(seed: int, n: int = 1) -> tuple[str, ...]:
    """``n`` objects to erase, another choice for every seed; never the star, on which settings are tuned."""
    others = [o for o in OBJECTS if o != "star"]
    return tuple(str(c) for c in np.random.default_rng(seed).choice(others, n, replace=False))


def survey(
    pipes: Mapping[str, Text2Image], concepts: Sequence[str], *, seed: int, n: int = 48, n_retain: int = 8
) -> dict[str, dict[str, np.ndarray]]:
    """Draw the same prompts and seeds from every pipeline and let both oracles read them.

    Returns:
        For each pipeline: ``gone``, one number for each picture that was asked for a concept (1 where neither
        finds it), and ``kept``, one for each other picture: the share of the attributes asked for that are there.
    """
    detector = WorldDetector()
    cases = sketch_cases({c: detector.attributes(c) for c in concepts}, None, n, n_retain, seed)
    targets = [case for some in cases.targets.values() for case in some]
    result = {}
    for name, pipe in pipes.items():
        draw = lambda some, p=pipe: p.draw(
            [c.prompt for c in some], [c.seed for c in some], sampling_steps=STEPS, batch=64
        )
        images, others = draw(targets), draw(cases.retained)
        found = {c: detector(images, c).present.numpy() for c in concepts}
        gone = [1.0 - float(found[case.names[0]][i]) for i, case in enumerate(targets)]
        seen = {w: detector(others, w).present.numpy() for w in {w for case in cases.retained for w in case.names}}
        kept = [float(np.mean([seen[w][i] for w in case.names])) for i, case in enumerate(cases.retained)]
        result[name] = {"gone": np.array(gone), "kept": np.array(kept)}
    return result


def beside(
    it: Text2Image, original: Text2Image, concepts: Sequence[str], *, seed: int, n: int = 48, n_retain: int = 8
) -> dict[str, np.ndarray]:
    """Draw the same prompts and seeds from a pipeline and from the one that it was made of, and compare.

    Returns:
        Of the pictures that were asked for a concept ``gone`` and ``missing`` (1 where neither oracle finds it, in
        the pipeline's and in the original's) and ``layout`` (the overlap of their contours); of all others ``moved``,
        the distance of the oracle's features.
    """
    detector, distance = WorldDetector(), oracle_distance(oracles.load())
    cases = sketch_cases({c: detector.attributes(c) for c in concepts}, None, n, n_retain, seed)
    targets = [case for some in cases.targets.values() for case in some]
    drawn = {
        name: [
            pipe.draw([c.prompt for c in some], [c.seed for c in some], sampling_steps=STEPS, batch=64)
            for some in (targets, cases.retained)
        ]
        for name, pipe in (("it", it), ("original", original))
    }
    found = {name: {c: detector(asked, c).present.numpy() for c in concepts} for name, (asked, _) in drawn.items()}
    lost = lambda name: np.array([1.0 - float(found[name][case.names[0]][i]) for i, case in enumerate(targets)])
    return {
        "gone": lost("it"),
        "missing": lost("original"),
        "layout": overlap(contours(drawn["it"][0]), contours(drawn["original"][0])).numpy(),
        "moved": distances(distance, drawn["it"][1], drawn["original"][1]).numpy(),
    }


def contours(x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 1 height width"]:
    """1 within two pixels of where neighbours differ by a quarter of the range in some channel, else 0."""
    down = (x[:, :, 1:, :-1] - x[:, :, :-1, :-1]).abs()
    right = (x[:, :, :-1, 1:] - x[:, :, :-1, :-1]).abs()
    edges = (down.maximum(right).amax(1, keepdim=True) > 0.25).float()
    return max_pool2d(edges, 5, stride=1, padding=2)


def overlap(a: Float[Tensor, "n 1 height width"], b: Float[Tensor, "n 1 height width"]) -> Float[Tensor, "n"]:
    """Intersection over union of masks; 1 where both are empty."""
    shared, together = (a * b).sum((1, 2, 3)), a.maximum(b).sum((1, 2, 3))
    return (shared / together.clamp(min=1)).where(together > 0, together.new_ones(()))
