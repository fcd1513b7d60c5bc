"""CopyScope: Shapley shares find what parts do where leaving one out misses parts that stand in for one another."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sfumato.attribute import CopyScope
from sfumato.attribute.parts.game import shapley
from sfumato.attribute.parts.workflow import Part, Setup, Workflow, drawn
from sfumato.data import sketch as world
from sfumato.metrics.extractors import make_extractor

from .core import Claim, Experiment, Found
from .erasure import concepts_of, sketch

PICTURES, STEPS, ORIGINALS = 24, 20, 48
WASH, TINT = 0.6, 0.25
"""Strengths of the two constructed effects."""


def coloured(channel: int, strength: float, mark: str) -> Part:
    """A part that moves a colour towards full, once, whichever part of this channel came first."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, channel] += strength * (1 - x[:, channel])
        return x

    change.__name__ = f"channel {channel}"

    def apply(setup: Setup) -> Setup:
        done = {getattr(f, "__name__", "") for f in setup.after}
        return setup if change.__name__ in done else replace(setup, after=(*setup.after, change))

    return Part(name=mark, kind="python", apply=apply)


def constructed(seed: int) -> Workflow:
    """Four parts of known effect: two that do one thing either of which is enough, a smaller one, one that idles."""
    parts = (
        coloured(0, WASH, "wash"), coloured(0, WASH, "glaze"), coloured(2, TINT, "tint"),
        Part(name="idle", kind="python", apply=lambda setup: setup),
    )  # fmt: skip
    seeds = tuple(1000 * seed + i for i in range(PICTURES))
    prompt = world.prompt(object=concepts_of(seed)[0])
    return Workflow(model=sketch(), prompt=prompt, parts=parts, seeds=seeds, sampling_steps=STEPS)


def truth(worth: dict[int, float]) -> list[float]:
    """The Shapley values of the game as it was constructed, from the four worths that differ in it.

    Any alliance is worth what its effects are: the wash (whoever brings it), the tint, both or neither.
    """
    table = [worth[(1 if a & 3 else 0) | (a & 4)] for a in range(16)]
    return shapley(torch.tensor(table, dtype=torch.float64)).tolist()


def measure(seed: int) -> Found:
    """Shares of the constructed workflow, and of words that the pipeline is told twice."""
    extractor = make_extractor("pixels")
    method = CopyScope(distance="fid", seed=seed)
    flow = constructed(seed)
    whole = replace(flow, seeds=tuple(500_000 + 1000 * seed + i for i in range(ORIGINALS)))
    originals = drawn(whole, 0b1111, whole.seeds)
    found, _ = method.attribute(flow, originals, extractor=extractor)
    known = truth(found.worth)
    scale = sum(map(abs, known))
    off = lambda values: [abs(x.value - y) / scale for x, y in zip(values, known, strict=True)]

    colour = ("red", "blue", "green", "yellow")[seed % 4]
    twice = tuple(Part(name=name, kind="phrase", source=colour) for name in ("first", "second"))
    said = Workflow(
        model=flow.model, prompt=f"a {{first}} {concepts_of(seed)[0]}", parts=twice, seeds=flow.seeds,
        sampling_steps=STEPS,
    )  # fmt: skip
    theirs = drawn(replace(said, seeds=whole.seeds), 0b11, whole.seeds)
    words, _ = CopyScope(distance="fid", seed=seed).attribute(said, theirs, extractor=extractor)
    share = lambda values: sum(max(x.value, 0.0) for x in values) / max(words.worth[3], 1e-12)
    return {
        "truth": (off(found.shapley), off(found.loo)),
        "redundant": ([x.value / scale for x in found.shapley[:2]], [x.value / scale for x in found.loo[:2]]),
        "words": ([share(words.shapley)], [share(words.loo)]),
    }


EXPERIMENT = Experiment(
    name="copyscope",
    paper="arXiv 2311.12847",
    claims={
        "truth": Claim(
            "Shapley values are nearer to the constructed effects of parts than leaving one out is.",
            "Shapley values of all alliances",
            "leaving each part out of the whole",
            "Distance of each part's value from its constructed one, as a share of all of them.",
            better="lower",
        ),
        "redundant": Claim(
            "Of two parts that do the same, each has a share by its Shapley value, and none by leaving one out.",
            "Shapley values",
            "leaving one out",
            "Value of each of the two, as a share of all constructed ones.",
        ),
        "words": Claim(
            "Of a colour that the prompt says twice more is found by Shapley values than by leaving one saying out.",
            "Shapley values of the two sayings together",
            "leaving each out, together",
            "Positive values as a share of what both are worth.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="strengths of the constructed effects were chosen before any measurement; nothing was tuned",
    measure=measure,
    cost=170,
    notes="The constructed values are computed from the four worths in which the constructed game differs, so that "
    "they know the distance but not the method. Distances are Fréchet distances of pictures at 16 pixels a side.",
)
