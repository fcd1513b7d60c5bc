"""The audit: two models, the same prompts and seeds, and what a detector sees in the pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from sfumato import __version__
from sfumato.attack.base import Attack
from sfumato.data.cases import AttackCases, check_concepts, check_retained, names
from sfumato.errors import BadInput
from sfumato.fields import Count, Seed, check
from sfumato.metrics.detectors import Detector, detector_for
from sfumato.metrics.perceptual import Distance
from sfumato.pipeline import Text2Image, load_text2image, wrap
from sfumato.pipeline.equip import equip, with_strength
from sfumato.pipeline.lent import require_finite
from sfumato.pipeline.membrane import holds_membranes
from sfumato.plan import Plan
from sfumato.report.audit import AuditReport
from sfumato.report.schema import Interval

from . import protocol as protocols
from .asked import cases_for
from .drawing import Drawn, Original, Setup
from .gallery import gallery
from .measures import Attacks, Judged, alignment_measure, judged, make_distance
from .plan import plan
from .under_attack import assail, attack_names, make_attack, on_the_original


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Measures what an edit erased and what it kept: erasure, retention, integrity, alignment, and attacks.

    Both models draw the same (prompt, seed) pairs with the same settings. ``erasure`` is the share of the
    edited model's pictures in which the detector does not find the concept they were asked for.
    ``retention`` is paired: of the original's pictures in which the detector finds the retained concept, the
    share of whose counterparts it still does. Every rate has a bootstrap 95 % interval over pictures
    (Wilson's at exactly 0 or 1).

    `run` does all; `prepare`, `draw`, `attack`, `judge` and `report` are its steps.

    Cost: about 2 (n concepts + n_retain retained) pictures; for each attack and concept three runs of the
    attack, its own pictures, and 3 n_attack more. With the defaults, about 450 pictures for one concept of
    the embedded model.
    """

    before: str | os.PathLike | Text2Image
    """The original: an embedded model, a folder written by save_pretrained, a hub id, or a pipeline."""
    after: str | os.PathLike | Text2Image
    """The same model after the edit."""
    concepts: Sequence[str]
    """What was erased."""
    retain: Sequence[str] | None = None
    """What must have been kept; by default, in the sketch world, all its other words."""
    prompts: Sequence[str] | None = None
    """Prompts with {concept} in them; by default four plain ones, or the sketch world's own. Or a file with a row for
    each language: its name, the concept's name in it, and prompts with {concept}, apart by tabs (or commas in .csv);
    attacks take the first row's."""
    n: Count = 64
    """Pictures for each erased concept, and in each language."""
    n_retain: Count = 8
    """Pictures for each retained concept, at least."""
    n_attack: Count = 32
    """Pictures drawn under attack for each erased concept."""
    seed: Seed = 0
    """Of the choice of prompts, of the pictures' noise, of the intervals."""
    sampling_steps: Count = 25
    """Denoising steps."""
    cfg_scale: float | None = None
    """Guidance; by default the pipeline's."""
    scheduler: str | None = None
    """ddim or dpm++; by default the pipeline's."""
    detector: str | Detector | None = None
    """"world" (both oracles of the sketch world; its default); "imagenet" (a thousand classes) or "nudenet", if
    installed; or a folder or hub id of a transformers image classifier or CLIP, or a classifier's file in ONNX;
    KIND:MODEL, as in "classifier:FOLDER" or "zero-shot:FOLDER", where several kinds of detector could look with the
    same model."""
    attacks: Sequence[str | Attack] = ("concept-inversion",)
    """Names of attacks; empty for none."""
    distance: str | Distance | None = None
    """lpips, oracle, 1-ssim or mse; by default LPIPS where it runs without a download, else the features of the sketch
    world's oracle."""
    adapters: Sequence[str | os.PathLike] = ()
    """Adapter files of SPM, or folders that hold one, to attach to the edited model (the model that they were made
    from, or a fine-tune of it); each acts as strongly as a prompt resembles what it erases."""
    clip: str | None = None
    """Folder or hub id of a CLIP for the alignment of prompts and pictures; by default the oracle in the sketch world,
    and no alignment elsewhere."""
    batch: Count | None = None
    """Pictures drawn together; by default 64 up to 128 pixels a side, 8 above."""
    edit: Any = None
    """The eraser, or its record; by default read from the folder of the edited model."""
    device: str | None = None
    """Where the models run: cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the models' weights; by default float32. Pipelines that are given keep theirs."""
    prediction: Literal["eps", "v"] | None = None
    """What the networks in single files predict, where the files do not say it; folders say it."""
    offload: Literal["model", "sequential"] | None = None
    """Keep the weights in the machine's own memory, and bring to the accelerator one part of a model at a time, or one
    layer; attacks need whole parts."""
    progress: bool = True
    """Show bars."""

    def __post_init__(self) -> None:
        check(self)
        if self.offload == "sequential" and self.attacks:
            raise BadInput("attacks need whole parts of a model: offload by model, or leave the attacks out")
        object.__setattr__(self, "concepts", check_concepts(self.concepts, self.retain))
        if self.retain is not None:
            object.__setattr__(self, "retain", check_retained(self.retain))

    def run(self, announce: Callable[[Plan], None] | None = None) -> AuditReport:
        """Measure; ``announce`` is called with the plan before the first picture is drawn.

        Returns:
            The report, with a `Gallery` for its page.

        Warns:
            UserWarning: ``after`` is a folder that SPM wrote, whose weights have the adapters merged in at full
                strength.

        Raises:
            BadInput: a setting that cannot be, names and concepts before the first picture is drawn; weights or
                pictures that are not finite.
        """
        setup = self.prepare()
        if announce:
            announce(plan(setup))
        drawn, attacked = self.draw(setup), self.attack(setup)
        return self.report(setup, drawn, attacked, self.judge(setup, drawn, attacked))

    def prepare(self) -> Setup:
        """Load and check everything that is needed, and decide what to ask."""
        old, new = self._models()
        detector = detector_for(old.vocabulary, self.detector, [*self.concepts, *(self.retain or ())])
        cases = cases_for(
            detector, self.concepts, self.retain, self.prompts, self.n, self.n_retain, self.seed
        )
        distance, attacks = make_distance(self.distance), [make_attack(a, old) for a in self.attacks]
        for attack in attacks:
            for concept, rows in cases.targets.items():
                attacked = rows[: min(self.n, self.n_attack)]
                if odd := next((case.prompt for case in attacked if not names(case.prompt, concept)), None):
                    raise BadInput(
                        f"attacks ask for {concept!r} by name, and {odd!r} does not name it: put the row of the "
                        "language that calls it so first"
                    )
                attack.check(new, AttackCases(concept, attacked))
        sampling = {
            "sampling_steps": self.sampling_steps, "cfg_scale": self.cfg_scale, "scheduler": self.scheduler,
            "batch": self.batch or (64 if old.size <= 128 else 8),
        }  # fmt: skip
        named = dict(zip(attack_names(attacks), attacks, strict=True))
        aligned = alignment_measure(self.clip, detector)
        n_attack = min(self.n, self.n_attack) if cases.languages else self.n_attack
        return Setup(old, new, cases, detector, distance, aligned, named, n_attack, sampling, self.progress)

    def original(self, setup: Setup) -> Original:
        """What the original model draws, plainly and under each attack, for audits of the same that share it."""
        on = {n: {c: on_the_original(setup, n, c) for c in setup.cases.targets} for n in setup.attacks}
        return replace(Original.by(setup), attacked=on)

    def draw(self, setup: Setup, original: Original | None = None) -> Drawn:
        """The pictures of both models; the original's are not drawn where they are given."""
        return Drawn.by(setup, original)

    def attack(self, setup: Setup, original: Original | None = None) -> Attacks:
        """The pictures under each attack; the original's are not drawn where they are given."""
        known = lambda name, concept: original.attacked[name][concept] if original else None
        return {n: {c: assail(setup, n, c, known(n, c)) for c in setup.cases.targets} for n in setup.attacks}

    def judge(self, setup: Setup, drawn: Drawn, attacked: Attacks) -> Judged:
        """The figures."""
        return judged(setup, drawn, attacked, self.seed)

    def report(self, setup: Setup, drawn: Drawn, attacked: Attacks, figures: Judged) -> AuditReport:
        """Figures, protocol and pictures, as they are kept."""
        record = protocols.edit_record(_folder_of(self.adapters[0]) if self.adapters else self.after, self.edit)
        names = _name(self.before), _name(self.after)
        told = protocols.protocol(setup, figures, names)
        told["pictures"] = {"n": self.n, "n_retain": self.n_retain, "n_attack": self.n_attack}
        return AuditReport(
            concepts=list(self.concepts),
            erasure=figures.erasure,
            retention=figures.retention,
            kept=_kept(setup, figures),
            languages=figures.languages,
            integrity=figures.integrity,
            alignment=figures.alignment,
            attacks=figures.attacks,
            cost=protocols.cost_of(record, *protocols.parameters_changed(setup.old, setup.new)),
            protocol=told,
            method=protocols.method_of(record),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            sfumato=__version__,
            reproduce=protocols.command(*names, self.concepts, self._changed()),
            gallery=gallery(setup, drawn, attacked, figures.moved),
        )

    def _models(self) -> tuple[Text2Image, Text2Image]:
        """Both, if they are a sound pair."""
        before, after = _name(self.before), _name(self.after)
        old, new = self._open(self.before), equip(self._open(self.after), self.after, self.adapters)
        if holds_membranes(self.after):
            warnings.warn(
                f"{after} is audited as other tools load it, its adapters merged in at full strength; to audit them as "
                f"they act here, each as strongly as the prompt asks: --after {before} --adapter {after}",
                stacklevel=4,
            )
        if old.family != new.family:
            raise BadInput(f"one model is of the family {old.family}, the other of {new.family}: they are no pair")
        if old.size != new.size:
            raise BadInput(f"the models draw pictures of {old.size} and of {new.size} pixels: they are no pair")
        for pipe, who in ((old, f"the original model ({before})"), (new, f"the edited model ({after})")):
            try:
                require_finite(pipe)
            except BadInput as error:
                raise BadInput(f"{who} is broken: {error}") from error
        return old, new

    def _open(self, model: str | os.PathLike | Text2Image) -> Text2Image:
        if not isinstance(model, (str, os.PathLike)):
            return wrap(model)
        dtype = getattr(torch, self.dtype) if self.dtype else None
        return load_text2image(os.fspath(model), self.device, dtype, self.prediction, self.offload)

    def _changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults and that a command line can say."""
        silent = ("before", "after", "concepts", "edit", "progress")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in silent}
        defaults = {f.name: f.default for f in fields(self)}
        return {k: value for k, value in given.items() if value != defaults[k] and _sayable(value)}


def audit(
    before: str | os.PathLike | Text2Image,
    after: str | os.PathLike | Text2Image,
    concepts: Sequence[str],
    *,
    announce: Callable[[Plan], None] | None = None,
    **settings: Any,
) -> AuditReport:
    """`Audit` in one call: ``audit(before=pipe, after=erased, concepts=["star"]).save("report/")``.

    Args:
        before: the original: an embedded model, a folder written by save_pretrained, a hub id, or a pipeline.
        after: the same model after the edit.
        concepts: what was erased.
        announce: called with the plan before the first picture is drawn.
        settings: the other fields of `Audit`.

    Raises:
        BadInput: as `Audit.run`.
    """
    return Audit(before=before, after=after, concepts=concepts, **settings).run(announce)


def _kept(setup: Setup, figures: Judged) -> dict[str, Interval | None]:
    """The mean retention of all concepts, and of each group where there are several, over pictures."""
    if figures.kept is None:
        return {}
    groups = setup.cases.groups if len(setup.cases.groups) > 1 else {}
    return {name: figures.kept.mean(some) for name, some in {"all": setup.cases.concepts, **groups}.items()}


def _folder_of(adapter: str | os.PathLike) -> Path:
    """Where an adapter file lies, and with it the record of its making."""
    path, _ = with_strength(adapter)
    return path if path.is_dir() else path.parent


def _name(model: str | os.PathLike | Text2Image) -> str:
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else "in memory"


def _sayable(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(part, (str, int, float, os.PathLike)) for part in parts)
