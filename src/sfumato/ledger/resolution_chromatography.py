"""Resolution chromatography: are coarse resolutions made first, when the schedule says, and can each have a prompt?"""

from __future__ import annotations

from itertools import pairwise

import torch

from sfumato.data import oracle, sketch
from sfumato.data.cases import balanced
from sfumato.data.world import WORDS
from sfumato.steer.resolution_chromatography import (
    chromatogram,
    half_times,
    level_gains,
    measure,
    prompt_schedule,
    signal_present,
)

from .core import Claim, Experiment, Found
from .erasure import sketch as pipeline

Pairs = tuple[list[float], list[float]]
WATCHED, GROUPS, WATCHED_STEPS = 48, 4, 50
COMPOSED, STEPS, COARSE = 32, 25, 4


def _others(words: list[str], of: tuple[str, ...]) -> list[str]:
    """For each word another one: the next."""
    return [of[(of.index(w) + 1) % len(of)] for w in words]


def watch(seed: int) -> Found:
    """Watch a run at every level of the latents, and draw with a prompt for the coarse level and one for the fine.

    The run that is watched is told nothing: what a prompt says is there from the start, and need not be generated.
    """
    pipe, rng = pipeline(), torch.Generator().manual_seed(seed)
    side, schedule = pipe.latent_shape()[-1], pipe.process.schedule
    levels = tuple(2**i for i in range(side.bit_length()))
    asked = {a: balanced(words, WATCHED, rng) for a, words in WORDS.items()}
    times, x0 = measure(pipe, [""] * WATCHED, [1000 * seed + i for i in range(WATCHED)], WATCHED_STEPS)
    order: Pairs = ([], [])
    law: Pairs = ([], [])
    for group in x0.split(WATCHED // GROUPS, dim=1):
        halves = half_times(times, signal_present(group, levels)).tolist()
        predicted = chromatogram(schedule, levels, gains=level_gains(group[-1], levels)).peaks.tolist()
        for fine, coarse in pairwise(halves):
            order[0].append(coarse)
            order[1].append(fine)
        for half, peak in zip(halves[1:], predicted[1:], strict=True):
            law[0].append(abs(half - peak))
            law[1].append(abs(half - predicted[0]))
    a = {name: words[:COMPOSED] for name, words in asked.items()}
    b = {name: _others(words, WORDS[name]) for name, words in a.items()}
    written = lambda words: [sketch.prompt(**{n: words[n][i] for n in WORDS}) for i in range(COMPOSED)]
    seeds, read = [1000 * seed + 500 + i for i in range(COMPOSED)], oracle.load()

    def follows(coarse: dict, fine: dict, attribute: str, wanted: dict) -> list[float]:
        cond = prompt_schedule(pipe, {1: written(fine), COARSE: written(coarse)})
        pictures = pipe.draw(None, seeds, cond=cond, sampling_steps=STEPS, scheduler="ddim")
        found = read(pictures)[attribute].argmax(dim=1).tolist()
        return [float(oracle.WORDS[attribute][i] == w) for i, w in zip(found, wanted[attribute], strict=True)]

    return {
        "order": order,
        "law": law,
        "coarse": (follows(a, b, "background", a), follows(b, a, "background", a)),
        "fine": (follows(a, b, "style", b), follows(b, a, "style", b)),
    }


EXPERIMENT = Experiment(
    name="resolution-chromatography",
    paper="arXiv 2401.10247",
    claims={
        "order": Claim(
            "Of the averages over blocks, those over larger ones are settled first.",
            "blocks of twice the side",
            "blocks of a side",
            "Time (1 = noise) at which half of the final signal of that level is in the predicted picture.",
        ),
        "law": Claim(
            "Each level is settled when the schedule says: where its SNR, m^2 times that of the picture, is one.",
            "the predicted time of the level, with the variance of its averages",
            "the predicted time of the picture itself, for all levels",
            "Distance in time to where half of the level's signal is there.",
            better="lower",
        ),
        "coarse": Claim(
            "The prompt given to the coarse level decides the background.",
            "the prompt at the coarse level, another at the fine one",
            "the two swapped",
            "Share of pictures in which the oracle reads that prompt's background.",
        ),
        "fine": Claim(
            "The prompt given to the fine level decides the style.",
            "the prompt at the fine level, another at the coarse one",
            "the two swapped",
            "Share of pictures in which the oracle reads that prompt's style.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned; the coarse level is blocks of 4 x 4 of the 8 x 8 latents",
    measure=watch,
    cost=110,
    notes="The levels are averages of latents, to which the law applies roughly. A time at which a level starts with "
    "more than half of its signal counts as 1. With prompts all levels did, the finest too: a network that has been "
    "told the picture predicts it from noise alone; so the run is watched without. The coarse level, at seed 0: with "
    "a guidance of 1 and 1.5 and with blocks of 2 and 8, too, the prompt of the fine level decided as many backgrounds "
    "as the coarse one's or more.",
)
