"""ProSpect: a word said in some stages gives an attribute without the rest; one token for all times gives both."""

from __future__ import annotations

import numpy as np
import torch

from sfumato.customize import ProSpect, TextualInversion
from sfumato.data.sketch import COLOURS, OBJECTS
from sfumato.metrics.detectors import OracleDetector
from sfumato.pipeline import Text2Image

from .core import Claim, Experiment, Found
from .erasure import STEPS, sketch

N = 32


def measure(seed: int) -> Found:
    """Learn one picture of a coloured object both ways; ask for another object in what was learned of it."""
    pipe, detector, rng = sketch(), OracleDetector(), np.random.default_rng(seed)
    mine, *others = (str(o) for o in rng.permutation(OBJECTS))
    colour = str(rng.choice(COLOURS))
    picture = pipe.draw(f"a {colour} {mine}", 10_000 + seed, sampling_steps=STEPS)
    same = {"updates": 300, "batch": 8, "init_word": "shape", "seed": seed}
    learners = [cls(**{**cls.settings_for(pipe), **same}) for cls in (ProSpect, TextualInversion)]
    asked = [f"a {{}} {others[i % 4]}" for i in range(N)]

    def told(made: Text2Image, word: str) -> dict[str, np.ndarray]:
        drawn = made.draw([a.format(word) for a in asked], list(range(N)), sampling_steps=STEPS, batch=N)
        there = detector(drawn, colour).present.numpy().astype(float)
        of = [detector(drawn, other).present.numpy() for other in others[:4]]
        kept = np.array([float(of[i % 4][i]) for i in range(N)])
        leaked = detector(drawn, mine).present.numpy().astype(float)
        return {"both": there * kept, "colour": there, "asked": kept, "leaked": leaked}

    with torch.no_grad():
        plain = told(pipe, "")
    pipes = [learner.run(pipe, picture) for learner in learners]
    parts, one = told(pipes[0], "<mine:material>"), told(pipes[1], "<mine>")
    figures = {"stages": parts, "one token": one, "without": plain}
    return {
        "separation": (parts["both"], one["both"]),
        "leakage": (parts["leaked"], one["leaked"]),
        "shares": {name: {key: float(x.mean()) for key, x in of.items()} for name, of in figures.items()},
    }


EXPERIMENT = Experiment(
    name="prospect",
    paper="arXiv 2305.16225",
    claims={
        "separation": Claim(
            "Stages of time separate attributes: another object takes on the learned colour and stays that object.",
            "ProSpect, the word in the stages of material",
            "textual inversion, with as many updates of as many pictures",
            "Share of pictures with the colour of the learned picture and the object that was asked for.",
        ),
        "leakage": Claim(
            "A word said in late stages alone does not bring the learned object along.",
            "ProSpect, the word in the stages of material",
            "textual inversion, with as many updates of as many pictures",
            "Share of pictures of another object in which the oracle finds the learned one.",
            better="lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="the preset 'sketch', chosen by its cost; nothing tuned",
    measure=measure,
    cost=190,
)
