"""Pullback: do its directions change pictures more than others, and do pictures share them while they are noise?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data import oracle, sketch
from sfumato.data.cases import balanced
from sfumato.data.world import WORDS
from sfumato.edit import Pullback
from sfumato.edit.base import Given
from sfumato.edit.parts.geometry import Basis, geodesic_distance, mean_frequency, unit
from sfumato.edit.parts.tangents import tangents
from sfumato.metrics.perceptual import oracle_distance

from .core import Claim, Experiment, Found
from .erasure import sketch as pipeline

PICTURES, STEPS, EARLY, LATE = 6, 25, 0.9, 0.2
SETTINGS = {"sampling_steps": STEPS, "rank": 6, "oversample": 6, "iterations": (6, 12)}
LENGTH, MOVED = 2.0, 3
"""How far a latent is moved (of about 16, its length), and along how many directions of each kind."""


def measure(seed: int) -> Found:
    """The tangent spaces of some pictures, early and late, and pictures moved along directions of equal length."""
    pipe, rng = pipeline(), torch.Generator().manual_seed(seed)
    asked = {a: balanced(words, PICTURES, rng) for a, words in WORDS.items()}
    prompts = tuple(sketch.prompt(**{a: asked[a][i] for a in WORDS}) for i in range(PICTURES))
    given = Given(prompts, tuple(1000 * seed + i for i in range(PICTURES)))
    edit = Pullback(**SETTINGS, seed=seed)
    start, seeds = edit.start(pipe, given), list(given.seeds)
    walk = list(edit.states(pipe, start, seeds))
    found = tangents(edit.basis, pipe, walk, (EARLY, LATE), start.cond)
    (early, bases), (_, late) = sorted(found.items(), reverse=True)
    told = tangents(edit.basis, pipe, walk, (EARLY, LATE), start.cond, shared=True)
    (_, spoken), (_, mumbled) = sorted(told.items(), reverse=True)
    z = next(z for z, t in walk if t == early)
    random = [_random(x, rng) for x in z]
    draw = lambda moved: pipe.draw(
        None, seeds, cond=start.cond, start=(moved, early), sampling_steps=STEPS, cfg_scale=1.0, scheduler="ddim"
    )
    plain, far = draw(z), oracle_distance(oracle.load())
    changes = {
        kind: torch.stack([far(draw(z + LENGTH * torch.stack([v[k] for v in ways])), plain) for k in range(MOVED)])
        for kind, ways in {"found": [b.v for b in bases], "random": random}.items()
    }
    frequency = [[float(mean_frequency(b.v).mean()) for b in some] for some in (late, bases)]
    return {
        "changes": (changes["found"].mean(0).tolist(), changes["random"].mean(0).tolist()),
        "frequency": (frequency[0], frequency[1]),
        "samples": (_apart(bases), _apart(late)),
        "prompts": (_apart(spoken), _apart(mumbled)),
    }


def _random(x: Float[Tensor, "*latent"], rng: torch.Generator) -> Float[Tensor, "direction *latent"]:
    """Directions that nobody chose, of unit length."""
    return torch.stack([unit(torch.randn(x.shape, generator=rng)) for _ in range(MOVED)]).to(x)


def _apart(bases: Sequence[Basis]) -> list[float]:
    return [float(geodesic_distance(a.u, b.u)) for a, b in combinations(bases, 2)]


_DISTANCE = "Geodesic distance of two tangent spaces of rank 6 in the bottleneck's features, for each pair."

EXPERIMENT = Experiment(
    name="pullback",
    paper="arXiv 2307.12868",
    claims={
        "changes": Claim(
            "Moved by the same length at an early time, pictures change more along the directions that were found.",
            "the first three directions",
            "three random directions",
            "Oracle feature distance to the picture that was not moved, mean over three directions.",
        ),
        "frequency": Claim(
            "The directions pass from low frequencies to high ones as noise falls.",
            f"at time {LATE}",
            f"at time {EARLY}",
            "Mean spatial frequency of the directions, as a share of the highest, for each picture.",
        ),
        "samples": Claim(
            "The tangent spaces of different pictures are nearer to each other while they are noise.",
            f"at time {EARLY}",
            f"at time {LATE}",
            _DISTANCE,
            better="lower",
        ),
        "prompts": Claim(
            "What the prompt changes about the tangent space fades as noise falls.",
            f"at time {EARLY}",
            f"at time {LATE}",
            _DISTANCE + " Prompts differ, the latent is the same.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned: the length is at most what 16 of the paper's steps come to, in proportion to the "
    "latent's",
    measure=measure,
    cost=150,
    notes="The embedded network has latents of 8 x 8 with four channels, Stable Diffusion's 64 x 64; the paper "
    "compares tangent spaces of rank 50. Its finding on data sets takes several models.",
)
