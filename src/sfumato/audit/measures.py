"""From pictures to the report's figures, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.attack.parts.outcome import outcome
from sfumato.data import oracle as oracles
from sfumato.errors import unknown
from sfumato.metrics.alignment import ClipScore
from sfumato.metrics.bootstrap import Estimate, rate_interval, share_interval
from sfumato.metrics.detectors import Detector
from sfumato.metrics.detectors.base import Agreement
from sfumato.metrics.perceptual import LPIPS, MSE, Distance, OneMinusSSIM, lpips_missing, oracle_distance
from sfumato.metrics.resize import to_float
from sfumato.report import schema
from sfumato.report.schema import Interval, PromptDistance

from .drawing import Drawn, Pictures, Setup
from .integrity import BATCH, different_prompts, distances, integrity
from .kept import Kept
from .under_attack import Attacked

Attacks = Mapping[str, Mapping[str, Attacked]]
"""Attack -> concept -> pictures."""


@dataclass(frozen=True)
class Judged:
    """The figures of an audit.

    Attributes:
        seen: concept -> the share of the original's pictures asked to show it in which the detector finds it.
        unasked: erased concept -> the same share where it was not asked for.
        moved: how far each retained picture has moved.
        kept: what ``retention`` was read off, picture by picture; None where nothing is retained.
    """

    erasure: Mapping[str, Interval]
    retention: Mapping[str, Interval]
    integrity: schema.Integrity | None
    alignment: schema.Alignment | None
    attacks: Mapping[str, schema.Attack]
    seen: Mapping[str, float | None]
    unasked: Mapping[str, float | None]
    moved: Float[Tensor, "n"]
    languages: Mapping[str, schema.Language] = field(default_factory=dict)
    kept: Kept | None = None


def judged(setup: Setup, drawn: Drawn, attacked: Attacks, seed: int) -> Judged:
    """Every figure; ``seed`` of the intervals' bootstrap."""
    rng = torch.Generator().manual_seed(seed)
    erasure, seen = erasure_of(setup, drawn, rng)
    retention, seen_kept, table = retention_of(setup, drawn, rng, seed)
    kept = drawn.kept.before
    moved = distances(setup.distance, kept, drawn.kept.after)
    return Judged(
        erasure,
        retention,
        integrity_of(setup, drawn, moved, rng) if len(kept) else None,
        alignment_of(setup, drawn, rng) if len(kept) and setup.alignment else None,
        attacks_of(setup, drawn, attacked, rng),
        {**seen, **seen_kept},
        {concept: share(present(setup.detector, kept, concept)) for concept in setup.cases.targets},
        moved,
        languages_of(setup, drawn, torch.Generator().manual_seed(seed)),
        table,
    )


def interval(estimate: Estimate) -> Interval:
    """The report's form of an estimate."""
    return Interval(estimate.value, estimate.low, estimate.high, estimate.n)


def present(detector: Detector, pictures: Pictures, concept: str) -> Bool[Tensor, "n"]:
    """Whether the detector finds the concept in each, a batch at a time: all as floats take four times the room."""
    return torch.cat([detector(to_float(part), concept).present for part in pictures.split(BATCH)])


def share(hits: Bool[Tensor, "n"]) -> float | None:
    return float(hits.double().mean()) if len(hits) else None


def erasure_of(
    setup: Setup, drawn: Drawn, rng: torch.Generator
) -> tuple[dict[str, Interval], dict[str, float | None]]:
    """(erased concept -> share of the edited model's pictures without it, the detector's rate on the original)."""
    rates, seen, start = {}, {}, 0
    for concept, rows in setup.cases.targets.items():
        own = drawn.asked[start : start + len(rows)]
        there = [present(setup.detector, x, concept) for x in (own.before, own.after)]
        rates[concept] = interval(rate_interval(~there[1], rng))
        seen[concept] = share(there[0])
        start += len(rows)
    return rates, seen


def languages_of(setup: Setup, drawn: Drawn, rng: torch.Generator) -> dict[str, schema.Language]:
    """Language -> how much of what was asked for in it is gone, and was there before; a part of `erasure_of`."""
    found = {}
    for language in setup.cases.languages:
        own = drawn.asked[[i for i, case in enumerate(setup.targets) if case.language == language]]
        (concept,) = setup.cases.targets
        before, after = (present(setup.detector, x, concept) for x in (own.before, own.after))
        found[language] = schema.Language(interval(rate_interval(~after, rng)), share(before))
    return found


def retention_of(
    setup: Setup, drawn: Drawn, rng: torch.Generator, seed: int
) -> tuple[dict[str, Interval], dict[str, float | None], Kept | None]:
    """(retained concept -> paired retention rate, retained concept -> the detector's rate on the original, and what
    both were read off).

    Only pictures of prompts that name a concept count for it; n is the number of those in which the detector
    finds it in the original's picture.
    """
    rates, seen, concepts = {}, {}, setup.cases.concepts
    counted = torch.zeros(len(setup.cases.retained), len(concepts), dtype=torch.bool)
    there = counted.clone()
    for k, concept in enumerate(concepts):
        rows = [i for i, case in enumerate(setup.cases.retained) if concept in case.names]
        own = drawn.kept[rows]
        old, new = (present(setup.detector, x, concept) for x in (own.before, own.after))
        rates[concept] = interval(rate_interval(new[old], rng))
        seen[concept] = share(old)
        counted[rows, k], there[rows, k] = old.cpu(), (old & new).cpu()
    return rates, seen, Kept(concepts, counted, there, seed) if concepts else None


def integrity_of(setup: Setup, drawn: Drawn, moved: Float[Tensor, "n"], rng: torch.Generator) -> schema.Integrity:
    prompts = [c.prompt for c in setup.cases.retained]
    estimate, means = integrity(prompts, moved, rng)
    before = drawn.kept.before
    apart = lambda other: float(distances(setup.distance, before[: len(other)], other).mean())
    return schema.Integrity(
        interval(estimate),
        setup.distance.name,
        floor=apart(drawn.again),
        ceiling_seeds=apart(drawn.reseeded),
        ceiling_prompts=different_prompts(setup.distance, prompts, before),
        per_prompt=[PromptDistance(prompt, d) for prompt, d in means.items()],
    )


def alignment_of(setup: Setup, drawn: Drawn, rng: torch.Generator) -> schema.Alignment:
    name, measure = setup.alignment
    prompts = [c.prompt for c in setup.cases.retained]
    parts = [slice(i, i + BATCH) for i in range(0, len(prompts), BATCH)]
    matched = lambda x: torch.cat([measure(to_float(x[part]), prompts[part]) for part in parts]).double()
    sides = [matched(x) for x in (drawn.kept.before, drawn.kept.after)]
    # A CLIP score is no share, but none of them is 0 or 1 in all pictures either.
    before, after = (interval(share_interval(x[torch.isfinite(x)], rng, method="bca")) for x in sides)
    return schema.Alignment(before, after, name)


def attacks_of(setup: Setup, drawn: Drawn, attacked: Attacks, rng: torch.Generator) -> dict[str, schema.Attack]:
    """For each attack how often it brings a concept back, over the pictures of all concepts."""
    rates, steps = {}, setup.sampling["sampling_steps"]
    before = _before(setup, drawn) if attacked else torch.empty(0, dtype=torch.bool)
    for name, pictures in attacked.items():
        hits = {part: _present(setup.detector, pictures, part) for part in ("recovered", "control", "original")}
        recovered, control, original = (None if x is None else interval(rate_interval(x, rng)) for x in hits.values())
        apart = outcome(before, hits["recovered"], rng)
        attack, cases = setup.attacks[name], next(iter(pictures.values())).recovered
        given = {"rows": attack.rows(len(cases), steps), "control": {c: setup.control(c) for c in pictures}}
        seconds, rows = (sum(getattr(x, part) for x in pictures.values()) for part in ("seconds", "rows"))
        rates[name] = schema.Attack(
            recovered, control, original, {**attack.budget(), **given}, seconds, rows,
            *(interval(x) for x in (apart.before, apart.further, apart.total)),
        )  # fmt: skip
    return rates


def _before(setup: Setup, drawn: Drawn) -> Bool[Tensor, "n"]:
    """Whether the plain prompts of the cases that are attacked show the concept on the edited model already."""
    parts, start = [], 0
    for concept, rows in setup.cases.targets.items():
        plain = drawn.asked.after[start : start + min(len(rows), setup.n_attack)]
        parts.append(present(setup.detector, plain, concept).cpu())
        start += len(rows)
    return torch.cat(parts)


def _present(detector: Detector, pictures: Mapping[str, Attacked], part: str) -> Bool[Tensor, "n"] | None:
    """Whether the detector finds the concept, in the pictures of all of them; None where some have no such part."""
    parts = {concept: getattr(x, part) for concept, x in pictures.items()}
    if any(x is None for x in parts.values()):
        return None
    return torch.cat([present(detector, x, concept) for concept, x in parts.items()])


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


def alignment_measure(clip: str | None, detector: Detector) -> tuple[str, Agreement] | None:
    """(name, measure) of prompt and picture: the CLIP score, or what the detector can tell, or None."""
    if clip is None:
        return detector.agreement()
    score = ClipScore(clip)
    return score.name, score
