"""The audit: two models, the same prompts and seeds, and what a detector sees in the pictures."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sfumato import __version__
from sfumato.attack.base import Attack
from sfumato.data import oracle as oracles
from sfumato.data.cases import Cases, check_concepts, sketch_cases, template_cases
from sfumato.errors import BadInput
from sfumato.metrics.bootstrap import rate_interval
from sfumato.metrics.detectors import Detector, OracleDetector, make_detector
from sfumato.metrics.perceptual import Distance
from sfumato.pipeline import Text2Image, load_text2image, wrap
from sfumato.pipeline.membrane import equip, holds_membranes
from sfumato.pipeline.sampling import make_scheduler
from sfumato.plan import Plan
from sfumato.progress import track
from sfumato.report import schema
from sfumato.report.audit import AuditReport
from sfumato.versions import versions

from . import protocol as protocols
from .gallery import gallery
from .integrity import distances
from .measures import (
    FLOOR,
    alignment_measure,
    alignment_of,
    integrity_of,
    interval,
    make_distance,
    pooled,
    retention_of,
    share,
)
from .plan import plan as planned
from .under_attack import Pictures, assail, attack_names, make_attack, to_bytes, to_float


def audit(
    before: str | os.PathLike | Text2Image,
    after: str | os.PathLike | Text2Image,
    concepts: Sequence[str],
    *,
    retain: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    n: int = 64,
    n_retain: int = 8,
    n_attack: int = 32,
    seed: int = 0,
    sampling_steps: int = 25,
    cfg_scale: float | None = None,
    scheduler: str | None = None,
    detector: str | Detector | None = None,
    attacks: Sequence[str | Attack] = ("concept-inversion",),
    distance: str | Distance | None = None,
    adapters: Sequence[str | os.PathLike] = (),
    clip: str | None = None,
    batch: int | None = None,
    edit: Any = None,
    progress: bool = True,
    announce: Callable[[Plan], None] | None = None,
) -> AuditReport:
    """Measure what an edit erased and what it kept: erasure, retention, integrity, alignment, and attacks.

    Both models draw the same (prompt, seed) pairs with the same settings. ``erasure`` is the share of the
    edited model's pictures in which the detector does not find the concept they were asked for.
    ``retention`` is paired: of the original's pictures in which the detector finds the retained concept, the
    share of whose counterparts it still does. Every rate has a bootstrap 95 % interval over pictures
    (Wilson's at exactly 0 or 1).

    Cost: about 2 (n concepts + n_retain retained) pictures; for each attack and concept three runs of the
    attack, its own pictures, and 3 n_attack more. With the defaults, about 450 pictures for one concept of
    the embedded model.

    Args:
        before: the original: an embedded model, a folder written by save_pretrained, a hub id, or a pipeline.
        after: the same model after the edit.
        concepts: what was erased.
        retain: what must have been kept; by default, in the sketch world, all its other words.
        prompts: prompts with {concept} in them; by default four plain ones, or the sketch world's own.
        n: pictures for each erased concept.
        n_retain: pictures for each retained concept, at least.
        n_attack: pictures drawn under attack for each erased concept.
        seed: of the choice of prompts, of the pictures' noise, of the intervals.
        sampling_steps: denoising steps.
        cfg_scale: guidance; by default the pipeline's.
        scheduler: ddim or dpm++; by default the pipeline's.
        detector: "oracle" (sketch world), or a folder or hub id of a transformers image classifier or CLIP.
        attacks: names of attacks; empty for none.
        distance: lpips, oracle, 1-ssim or mse; by default LPIPS where it runs without a download, else the
            features of the sketch world's oracle.
        adapters: adapter files of SPM, or folders that hold one, to attach to ``after`` (the model that they were
            made from, or a fine-tune of it); each acts as strongly as a prompt resembles what it erases.
        clip: folder or hub id of a CLIP for the alignment of prompts and pictures; by default the oracle in
            the sketch world, and no alignment elsewhere.
        batch: pictures drawn together; by default 64 up to 128 pixels a side, 8 above.
        edit: the eraser, or its record; by default read from the folder of the edited model.
        progress: show bars.
        announce: called with the plan before the first picture is drawn.

    Returns:
        The report, with a `Gallery` for its page.

    Warns:
        UserWarning: ``after`` is a folder that SPM wrote, whose weights have the adapters merged in at full strength.

    Raises:
        BadInput: anything above that cannot be; names and concepts before the first picture is drawn.
    """
    settings = _changed(locals())
    concepts = check_concepts(concepts, retain)
    if min(n, n_retain, n_attack) < 1:
        raise BadInput("an audit needs at least one picture of each kind: n, n_retain and n_attack from 1 on")
    if batch is not None and batch < 1:
        raise BadInput(f"batch must be at least 1, got {batch}")
    old, new = _open(before), equip(_open(after), after, adapters)
    if holds_membranes(after):
        warnings.warn(
            f"{_name(after)} is audited as other tools load it, its adapters merged in at full strength; to audit them "
            f"as they act here, each as strongly as the prompt asks: --after {_name(before)} --adapter {_name(after)}",
            stacklevel=2,
        )
    if old.family != new.family:
        raise BadInput(f"one model is of the family {old.family}, the other of {new.family}: they are no pair")
    if old.size != new.size:
        raise BadInput(f"the models draw pictures of {old.size} and of {new.size} pixels: they are no pair")
    batch = batch or (64 if old.size <= 128 else 8)
    sketch = bool(old.vocabulary)
    cases, detector = _plan(concepts, retain, prompts, n, n_retain, seed, detector, sketch)
    distance = make_distance(distance)
    aligned = alignment_measure(clip, detector)
    chosen = [make_attack(a, old) for a in attacks]
    names = attack_names(chosen)
    for attack in chosen:
        for concept, rows in cases.targets.items():
            attack.check(new, concept, [c.prompt for c in rows[:n_attack]])
    sampling = {"sampling_steps": sampling_steps, "cfg_scale": cfg_scale, "scheduler": scheduler, "batch": batch}
    if announce:
        announce(planned(old, new, cases, chosen, n_attack, sampling))
    rng = torch.Generator().manual_seed(seed)

    def draw(pipe: Text2Image, texts: Sequence[str], seeds: Sequence[int], label: str = "pictures") -> Pictures:
        return _draw(pipe, texts, seeds, sampling, label, progress)

    # The first few by themselves: the floor draws them again, and a batch of another size rounds differently.
    flat = [c for row in cases.targets.values() for c in row]
    parts = [cases.retained[:FLOOR], cases.retained[FLOOR:], flat]
    sides = []
    for pipe, label in ((old, "original model"), (new, "edited model")):
        drawn = [draw(pipe, [c.prompt for c in p], [c.seed for c in p], label) for p in parts if p]
        sides.append(torch.cat(drawn))
    k = len(cases.retained)
    kept, asked = [x[:k] for x in sides], [x[k:] for x in sides]

    erasure, seen = {}, {}
    for i, concept in enumerate(cases.targets):
        own = slice(i * n, (i + 1) * n)
        there = [detector(to_float(x[own]), concept).present for x in asked]
        erasure[concept] = interval(rate_interval(~there[1], rng))
        seen[concept] = share(there[0])
    retention, seen_kept = retention_of(cases, kept[0], kept[1], detector, rng)
    moved = distances(distance, to_float(kept[0]), to_float(kept[1]))
    told = [c.prompt for c in cases.retained]

    outcomes = {}
    for name, attack in zip(names, chosen, strict=True):
        outcomes[name] = {
            c: assail(attack, old, new, c, _control(c, cases), rows[:n_attack], detector, draw, sampling, progress)
            for c, rows in cases.targets.items()
        }
    every = [*cases.retained, *flat]
    record = protocols.edit_record(_folder_of(adapters[0]) if adapters else after, edit)
    return AuditReport(
        concepts=list(concepts),
        erasure=erasure,
        retention=retention,
        integrity=integrity_of(distance, cases, kept[0], moved, old, draw, rng) if k else None,
        alignment=alignment_of(aligned, kept, told, rng) if k and aligned else None,
        attacks={
            name: schema.Attack(
                *(pooled(outcomes[name], part, rng) for part in ("recovered", "control", "original")),
                budget={**attack.budget(), "control": {c: _control(c, cases) for c in concepts}},
            )
            for name, attack in zip(names, chosen, strict=True)
        },
        cost=protocols.cost_of(record, *protocols.parameters_changed(old, new)),
        protocol={
            "before": protocols.identity(old, _name(before)),
            "after": protocols.identity(new, _name(after)),
            "detector": detector.describe(),
            "prompts": [c.prompt for c in every],
            "seeds": [c.seed for c in every],
            "scheduler": _scheduler(old, scheduler),
            "sampling_steps": sampling_steps,
            "guidance": old.defaults["cfg_scale"] if cfg_scale is None else cfg_scale,
            "size": old.size,
            "resize": {
                "pictures": "none; rounded to 8 bits", "detector": detector.resize, "distance": distance.resize,
            },
            "distance": {"name": distance.name, "hash": distance.hash},
            "batch": batch,
            "pictures": {"n": n, "n_retain": n_retain, "n_attack": n_attack},
            "detected_before": {**seen, **seen_kept},
            "detected_unasked": {c: share(detector(to_float(kept[0]), c).present) for c in concepts},
            "groups": {name: list(words) for name, words in cases.groups.items()},
            "versions": versions(),
        },
        method=protocols.method_of(record),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        sfumato=__version__,
        reproduce=protocols.command(_name(before), _name(after), concepts, settings),
        gallery=gallery(cases, kept, asked, moved, n, outcomes),
    )  # fmt: skip


def _plan(
    concepts: Sequence[str],
    retain: Sequence[str] | None,
    prompts: Sequence[str] | None,
    n: int,
    n_retain: int,
    seed: int,
    detector: str | Detector | None,
    sketch: bool,
) -> tuple[Cases, Detector]:
    """What to draw and who looks at it; every concept is known to the detector."""
    if detector is None:
        if not sketch:
            raise BadInput(
                "say how to see the concept: detector=... (a transformers image classifier or a CLIP, folder or "
                "hub id); only the sketch world has an oracle"
            )
        detector = OracleDetector()
    detector = make_detector(detector, [*concepts, *(retain or ())])
    for concept in (*concepts, *(retain or ())):
        detector.check(concept)
    if isinstance(detector, OracleDetector) and prompts is None:
        attributes = {c: detector.attributes(c) for c in concepts}
        return sketch_cases(attributes, retain, n, n_retain, seed), detector
    if retain is None and isinstance(detector, OracleDetector):
        words = [w for known in oracles.WORDS.values() for w in known if w != oracles.NOTHING]
        retain = [w for w in words if w not in concepts]
    return template_cases(concepts, retain or (), prompts, n, n_retain, seed), detector


def _open(model: str | os.PathLike | Text2Image) -> Text2Image:
    return load_text2image(model) if isinstance(model, (str, os.PathLike)) else wrap(model)


def _folder_of(adapter: str | os.PathLike) -> Path:
    """Where an adapter file lies, and with it the record of its making."""
    return Path(adapter) if Path(adapter).is_dir() else Path(adapter).parent


def _name(model: str | os.PathLike | Text2Image) -> str:
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else "in memory"


def _scheduler(pipe: Text2Image, scheduler: str | None) -> dict[str, Any]:
    made = make_scheduler(pipe, scheduler)
    told = ("timestep_spacing", "steps_offset", "prediction_type")
    return {"name": type(made).__name__, **{k: made.config[k] for k in told if k in made.config}}


def _draw(
    pipe: Text2Image,
    texts: Sequence[str],
    seeds: Sequence[int],
    sampling: Mapping[str, Any],
    label: str,
    progress: bool,
) -> Pictures:
    """8-bit pictures, batch by batch, with a bar if wanted."""
    size = sampling["batch"]
    starts = track(range(0, len(texts), size), label, progress)
    parts = [to_bytes(pipe.draw(list(texts[i : i + size]), list(seeds[i : i + size]), **sampling)) for i in starts]
    return torch.cat(parts)


def _control(concept: str, cases: Cases) -> str | None:
    """The concept that a control attack learns: the first retained one of the nearest group."""
    return next((c for c in cases.concepts if c != concept), None)


def _changed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from their defaults and that a command line can say."""
    parameters, silent = inspect.signature(audit).parameters, ("edit", "progress", "announce")

    def sayable(value: Any) -> bool:
        parts = value if isinstance(value, (list, tuple)) else [value]
        return all(isinstance(part, (str, int, float)) for part in parts)

    return {
        k: given[k]
        for k, p in parameters.items()
        if p.default is not p.empty and k not in silent and given[k] != p.default and sayable(given[k])
    }
