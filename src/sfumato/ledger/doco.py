"""DoCo: a concept is gone for prompts that neither eraser saw, from more pictures than after ESD."""

from __future__ import annotations

import numpy as np

from sfumato.data.cases import Case
from sfumato.data.sketch import BACKGROUNDS, COLOURS, STYLES
from sfumato.data.sketch.captions import FULL, article, compose, prompt
from sfumato.erase import DoCo, ESDx
from sfumato.metrics.detectors import WorldDetector

from .core import Claim, Experiment, Figures, Found
from .erasure import STEPS, concepts_of, sketch, survey

UNSEEN = 96
"""Pictures asked for with words and phrasings that no caption of DoCo's has."""


def halves(seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Colours, backgrounds and styles that DoCo's captions name, and all the others."""
    rng = np.random.default_rng(100 + seed)
    orders = {"colour": COLOURS, "background": BACKGROUNDS, "style": STYLES}
    mixed = {a: [str(w) for w in rng.permutation(words)] for a, words in orders.items()}
    cut = lambda first: {a: words[::2] if first else words[1::2] for a, words in mixed.items()}
    return cut(True), cut(False)


def seen_prompts(seed: int) -> tuple[str, ...]:
    """Captions of "shape" in the canonical phrasing, with words of the first half."""
    words, _ = halves(seed)
    return tuple(prompt(None, c, b, s) for c in words["colour"] for b in words["background"] for s in words["style"])


def unseen_cases(concept: str, seed: int) -> list[Case]:
    """Cases that ask for the concept in other phrasings, with words of the other half."""
    _, words = halves(seed)
    rng, cases = np.random.default_rng(200 + seed), []
    for i in range(UNSEEN):
        colour, background, style = (str(rng.choice(words[a])) for a in ("colour", "background", "style"))
        said = compose(FULL[1 + i % (len(FULL) - 1)], article(f"{colour} {concept}"), background, style)
        cases.append(Case(said, seed * 100_000 + 50_000 + i, (concept,)))
    return cases


def measure(seed: int, arm: str) -> Figures:
    """Erase one object with one method, or not; ask for it in unseen ways, and for others."""
    concepts, pipe = concepts_of(seed), sketch()
    if arm == "DoCo":
        own = {"anchors": ("shape",), "prompts": seen_prompts(seed)}
        pipe = DoCo(concepts=concepts, seed=seed, **own, **DoCo.settings_for(pipe)).apply(pipe)
    elif arm == "ESD-x":
        pipe = ESDx(concepts=concepts, seed=seed, **ESDx.settings_for(pipe)).apply(pipe)
    cases = unseen_cases(concepts[0], seed)
    pictures = pipe.draw([c.prompt for c in cases], [c.seed for c in cases], sampling_steps=STEPS, batch=64)
    present = WorldDetector()(pictures, concepts[0]).present.float()
    found = survey({"it": pipe}, concepts, seed=seed, n=8, n_retain=6)["it"]
    return {"unseen": (1 - present).tolist(), "kept": found["kept"]}


def compare(arms: dict[str, Figures]) -> Found:
    """DoCo against ESD-x, and against the original."""
    return {
        "unseen": (arms["DoCo"]["unseen"], arms["ESD-x"]["unseen"]),
        "erasure": (arms["DoCo"]["unseen"], arms["original"]["unseen"]),
        "retention": (arms["DoCo"]["kept"], arms["ESD-x"]["kept"]),
    }


_GONE = "Share of pictures asked for the concept, in phrasings and with other words than the captions', without it."

EXPERIMENT = Experiment(
    name="doco",
    paper="arXiv 2405.15304",
    claims={
        "unseen": Claim(
            "DoCo generalises to unseen prompts better than ESD-x.",
            "DoCo, on captions with half of the colours, backgrounds and styles",
            "ESD-x, on the concept's name",
            _GONE,
        ),
        "erasure": Claim(
            "The concept is gone for unseen prompts.", "DoCo, on captions with half of the words", "the original", _GONE
        ),
        "retention": Claim(
            "DoCo keeps other concepts better than ESD-x.",
            "DoCo",
            "ESD-x",
            "Share of the attributes asked for that an oracle finds, in pictures of other concepts.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="ESD-x's preset 'sketch' by `sfumato bench tune` at seed 0 on 'star'; DoCo's the first tried there",
    measure=measure,
    arms=("DoCo", "ESD-x", "original"),
    compare=compare,
    cost={"DoCo": 85, "ESD-x": 150, "original": 25},
)
