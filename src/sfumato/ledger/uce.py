"""UCE: regularised editing keeps what unregularised editing of the same projections destroys."""

from __future__ import annotations

from sfumato.data.sketch import BACKGROUNDS, COLOURS, OBJECTS, STYLES
from sfumato.erase import UCE

from .core import Claim, Experiment, Found
from .erasure import concepts_of, sketch, survey


def measure(seed: int) -> Found:
    """Erase one object with and without regularisation, and look at its pictures and at all others."""
    concepts = concepts_of(seed)
    words = tuple(w for w in (*OBJECTS, *COLOURS, *BACKGROUNDS, *STYLES) if w not in concepts)
    pipe = sketch()
    pipes = {
        "original": pipe,
        "uce": UCE(concepts=concepts, preserve=words).apply(pipe),
        "bare": UCE(concepts=concepts, preserve=(), preserve_scale=0.0, lam=1e-6).apply(pipe),
    }
    seen = survey(pipes, concepts, seed=seed)
    return {
        "retention": (seen["uce"]["kept"], seen["bare"]["kept"]),
        "erasure": (seen["uce"]["gone"], seen["original"]["gone"]),
    }


EXPERIMENT = Experiment(
    name="uce",
    paper="arXiv 2308.14761",
    claims={
        "retention": Claim(
            "With preservation and regularisation, closed-form editing keeps other concepts far better than without.",
            "UCE, all other words preserved",
            "the same edit, nothing preserved and lam = 1e-6",
            "Share of the attributes asked for that an oracle finds, in pictures of other concepts.",
        ),
        "erasure": Claim(
            "The concept is gone from the pictures that ask for it.",
            "UCE, all other words preserved",
            "the original model",
            "Share of pictures asked for the concept in which neither oracle finds it.",
        ),
    },
    seeds=(1, 2, 3, 4),
    tuning="the paper's defaults, nothing tuned",
    measure=measure,
    cost=70,
)
