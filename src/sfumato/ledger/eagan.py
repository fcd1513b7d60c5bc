"""EAGAN: evolution against random search over the same supernet, with the same updates and evaluations."""

from __future__ import annotations

from dataclasses import replace

from sfumato.data.pictures import open_pictures
from sfumato.train.eagan import EAGAN
from sfumato.train.parts.candidates import judged

from .core import Claim, Experiment, Figures, Found

ROUNDS = 3
POPULATION = 8


def method(seed: int, evolve: bool) -> EAGAN:
    """Stage 1 on small pictures of the sketch world."""
    return EAGAN(
        **{
            **EAGAN.presets["small-sketch"], "generator_channels": 12, "discriminator_channels": 12, "pictures": 1000,
            "search_warmup": 60, "round_updates": 40, "rounds": ROUNDS, "population": POPULATION, "samples": 200,
            "batch": 16, "objectives": ("frechet", "parameters"), "evolve": evolve, "seed": seed, "track": "none",
        }
    )  # fmt: skip


def measure(seed: int, arm: str) -> Figures:
    """Distances and sizes of the population that a search ends with, half of it chosen, half of it new."""
    search = method(seed, arm == "evolution")
    pictures = open_pictures("sketch", search.size, seed=seed, count=search.pictures)
    judge = search._judge(pictures)
    stage = search.stage_one(pictures, judge)
    candidates, sizes = stage.candidates(stage.population.members)
    # noise and real pictures that no selection has seen
    other = replace(judge, seed=seed + 1000)
    scores = [s["frechet"] for s in judged([replace(c, judge=other) for c in candidates], 1)]
    return {"frechet": scores, "parameters": sizes, "best": min(scores)}


def compare(arms: dict[str, Figures]) -> Found:
    """The populations of both searches."""
    mean = lambda arm, name: sum(arms[arm][name]) / len(arms[arm][name])
    return {
        "population": ([mean("evolution", "frechet")], [mean("random", "frechet")]),
        "best": ([arms["evolution"]["best"]], [arms["random"]["best"]]),
        "figures": {
            arm: {"distance, mean": mean(arm, "frechet"), "parameters, mean": mean(arm, "parameters")} for arm in arms
        },
    }


EXPERIMENT = Experiment(
    name="eagan",
    paper="arXiv 2111.15097",
    claims={
        "population": Claim(
            "Evolution ends with a better population than random search with as many updates and evaluations.",
            "children of those that stay", "new genotypes at random",
            "Fréchet distance in random features, mean over the last population.", "lower",
        ),
        "best": Claim(
            "The best generator that it ends with is better, too.",
            "children of those that stay", "new genotypes at random",
            "Fréchet distance in random features, of the best of the last population.", "lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned on any seed; settings as first written.",
    measure=measure,
    arms=("evolution", "random"),
    compare=compare,
    cost=80,
    notes=f"Stage 1 alone, {ROUNDS} rounds of {POPULATION} generators of 12 channels for 16 pixels, scored with the "
    "supernet's weights on noise that the search has not seen. Both searches keep the better half; they differ in how "
    "the other half is made.",
)  # fmt: skip
