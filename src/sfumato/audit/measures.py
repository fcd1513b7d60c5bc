"""From pictures to the report's figures, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.data import oracle as oracles
from sfumato.data.cases import Cases
from sfumato.errors import unknown
from sfumato.metrics.alignment import ClipScore, oracle_alignment
from sfumato.metrics.bootstrap import Estimate, mean_interval, rate_interval
from sfumato.metrics.detectors import Detector, OracleDetector
from sfumato.metrics.perceptual import LPIPS, MSE, Distance, OneMinusSSIM, lpips_missing, oracle_distance
from sfumato.pipeline import Text2Image
from sfumato.report import schema
from sfumato.report.schema import Interval, PromptDistance

from .integrity import different_prompts, distances, integrity
from .under_attack import Outcome, Pictures, to_float

FLOOR = 8
"""Pictures that the original draws twice, to see that nothing but the edit tells the two models apart."""
CEILING = 16
"""Pictures that the original draws again with other seeds."""
OTHER_SEEDS = 50_000


def interval(estimate: Estimate) -> Interval:
    """The report's form of an estimate."""
    return Interval(estimate.value, estimate.low, estimate.high, estimate.n)


def share(hits: Bool[Tensor, "n"]) -> float | None:
    return float(hits.double().mean()) if len(hits) else None


def retention_of(
    cases: Cases, before: Pictures, after: Pictures, detector: Detector, rng: torch.Generator
) -> tuple[dict[str, Interval], dict[str, float | None]]:
    """(retained concept -> paired retention rate, retained concept -> the detector's rate on the original).

    Only pictures of prompts that name a concept count for it; n is the number of those in which the detector
    finds it in the original's picture.
    """
    rates, seen = {}, {}
    for concept in cases.concepts:
        rows = [i for i, case in enumerate(cases.retained) if concept in case.names]
        old, new = (detector(to_float(x[rows]), concept).present for x in (before, after))
        rates[concept] = interval(rate_interval(new[old], rng))
        seen[concept] = share(old)
    return rates, seen


def make_distance(distance: str | Distance | None) -> Distance:
    """A distance by name; None is LPIPS where it runs without a download, else the oracle's features."""
    if distance is None:
        distance = "oracle" if lpips_missing() else "lpips"
    if not isinstance(distance, str):
        return distance
    known: dict[str, Callable[[], Distance]] = {
        "lpips": LPIPS,
        "oracle": lambda: oracle_distance(oracles.load()),
        "1-ssim": OneMinusSSIM,
        "mse": MSE,
    }
    if distance not in known:
        raise unknown("distance", distance, known)
    return known[distance]()


def pooled(outcomes: Mapping[str, Outcome], part: str, rng: torch.Generator) -> Interval | None:
    hits = [getattr(o, part) for o in outcomes.values()]
    return None if any(h is None for h in hits) else interval(rate_interval(torch.cat(hits), rng))


def integrity_of(
    distance: Distance,
    cases: Cases,
    before: Pictures,
    moved: Float[Tensor, "n"],
    pipe: Text2Image,
    draw: Callable[..., Pictures],
    rng: torch.Generator,
) -> schema.Integrity:
    prompts = [c.prompt for c in cases.retained]
    estimate, means = integrity(prompts, moved, rng)
    again, other = cases.retained[:FLOOR], cases.retained[:CEILING]
    same = draw(pipe, [c.prompt for c in again], [c.seed for c in again], "floor")
    reseeded = draw(pipe, [c.prompt for c in other], [c.seed + OTHER_SEEDS for c in other], "ceiling")
    return schema.Integrity(
        interval(estimate),
        distance.name,
        floor=float(distances(distance, to_float(before[: len(again)]), to_float(same)).mean()),
        ceiling_seeds=float(distances(distance, to_float(before[: len(other)]), to_float(reseeded)).mean()),
        ceiling_prompts=different_prompts(distance, prompts, to_float(before)),
        per_prompt=[PromptDistance(prompt, d) for prompt, d in means.items()],
    )


Alignment = Callable[[Tensor, Sequence[str]], Float[Tensor, "n"]]


def alignment_measure(clip: str | None, detector: Detector) -> tuple[str, Alignment] | None:
    """(name, measure) of prompt and picture, or None."""
    if clip is not None:
        score = ClipScore(clip)
        return score.name, score
    if not isinstance(detector, OracleDetector):
        return None

    def agreement(pictures: Tensor, prompts: Sequence[str]) -> Float[Tensor, "n"]:
        with torch.no_grad():
            return oracle_alignment(detector.oracle(pictures), oracles.WORDS, prompts)

    return "share of the attributes named that the oracle reads off the picture", agreement


def alignment_of(
    aligned: tuple[str, Alignment], kept: Sequence[Pictures], prompts: Sequence[str], rng: torch.Generator
) -> schema.Alignment:
    name, measure = aligned
    sides = [measure(to_float(x), prompts).double() for x in kept]
    return schema.Alignment(*(interval(mean_interval(x[torch.isfinite(x)], rng)) for x in sides), measure=name)
