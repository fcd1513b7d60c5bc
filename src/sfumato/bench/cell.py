"""One cell of the bench of erasers: a method takes concepts out of a model once, and an audit judges it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sfumato import catalog
from sfumato.audit import Audit
from sfumato.audit.drawing import Original, Setup
from sfumato.audit.measures import Judged
from sfumato.audit.protocol import changed_tensors
from sfumato.files import atomic_file
from sfumato.foreign import reading
from sfumato.pipeline import Text2Image, load_text2image
from sfumato.pipeline.load import precision
from sfumato.pipeline.timing import peak_memory
from sfumato.report import page
from sfumato.report.audit import AuditReport
from sfumato.report.words import average


@dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Attributes:
        method: of the verb erase.
        concepts: what it erases, together.
        seed: of the edit, of prompts and noise.
        settings: the method's other settings.
        audit: settings of `Audit`, "before" (the model) among them; "attacks" as (name, settings).
        model_hash: of the model's weights.
    """

    method: str
    concepts: tuple[str, ...]
    seed: int
    settings: Mapping[str, Any]
    audit: Mapping[str, Any] = field(default_factory=dict)
    model_hash: str = ""

    def __str__(self) -> str:
        return f"{self.method}, {' + '.join(self.concepts)}, seed {self.seed}"

    @property
    def key(self) -> str:
        """Of everything that decides the result, so that a change of any is another cell."""
        told = json.dumps(asdict(self), sort_keys=True, default=str)
        return f"{self.method}-{self.seed}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    def original(self, folder: Path) -> Path:
        """Where a bench in ``folder`` keeps what the unedited model draws for all cells of these concepts and seed."""
        return folder / "originals" / f"{replace(self, method='original', settings={}).key}.safetensors"


def measure(cell: Cell, folder: Path | None = None) -> dict[str, Any]:
    """The cell's figures (JSON types), with its audit's ``report`` and ``page``, and ``original``: see `known`.

    Args:
        folder: the bench's, where this machine sees it.

    Raises:
        BadInput: the method does not fit the model, or the settings are none.
    """
    settings = dict(cell.audit)
    where = settings.get("device"), precision(settings.get("dtype")), settings.get("prediction")
    pipe = load_text2image(settings.pop("before"), *where)
    cls = catalog.get(cell.method, "erase").load()
    eraser = cls(concepts=cell.concepts, seed=cell.seed, **cell.settings)
    began = time.perf_counter()
    erased, log = eraser.run(pipe)
    seconds = time.perf_counter() - began
    record = {
        "method": {"name": cell.method}, "configuration": asdict(eraser),
        "cost": {"seconds": seconds, "peak_memory_bytes": peak_memory(erased)},
    }  # fmt: skip
    attacks = [catalog.get(name, "attack").load()(**chosen) for name, chosen in settings.pop("attacks", ())]
    told = {**settings, "attacks": attacks, "seed": cell.seed, "edit": record, "progress": False}
    audit = Audit(before=pipe, after=erased, concepts=cell.concepts, **told)
    setup = audit.prepare()
    original, unknown = known(cell, audit, setup, folder)
    drawn, attacked = audit.draw(setup, original), audit.attack(setup, original)
    judged = audit.judge(setup, drawn, attacked)
    report = audit.report(setup, drawn, attacked, judged)
    return {
        "figures": figures(report, judged, pipe, erased),
        "settings": {k: v for k, v in asdict(eraser).items() if k not in ("concepts", "seed")},
        "log": _plain(log),
        "report": report.to_json(),
        "page": page.render(report, report.gallery),
        "original": unknown,
    }


def known(cell: Cell, audit: Audit, setup: Setup, folder: Path | None) -> tuple[Original, bytes | None]:
    """What the original draws, from the bench's folder if another cell has drawn it; else drawn, and as bytes too.

    Raises:
        BadInput: the file there is damaged.
    """
    if folder is not None and (file := cell.original(folder)).exists():
        with reading(file, "what the original model drew", "remove it, and it is drawn again"):
            return Original.from_bytes(file.read_bytes()), None
    original = audit.original(setup)
    return original, original.to_bytes()


def keep_original(cell: Cell, folder: Path, result: dict[str, Any]) -> None:
    """Take what the original drew out of a result, and put it where the next cells find it."""
    data, file = result.pop("original", None), cell.original(folder)
    if data is not None and not file.exists():
        file.parent.mkdir(exist_ok=True)
        with atomic_file(file) as temporary:
            temporary.write_bytes(data)


def figures(report: AuditReport, judged: Judged, before: Text2Image, after: Text2Image) -> dict[str, Any]:
    """What the table shows of an audit; None for what was not measured."""
    near, far = sides(report, before)
    mean = lambda *some: judged.kept and judged.kept.mean(*some)
    json = lambda interval: None if interval is None else interval.to_json("value")
    seen = [x for c in report.concepts if (x := report.protocol["detected_before"].get(c)) is not None]
    return {
        "seen": sum(seen) / len(seen) if seen else None,
        "erasure": json(average(list(report.erasure.values()))),
        "near": json(mean(near)),
        "far": json(mean(far)),
        "kept": json(mean(near, far)),
        "integrity": json(report.integrity and report.integrity.mean),
        "alignment before": json(report.alignment and report.alignment.before),
        "alignment": json(report.alignment and report.alignment.after),
        "attacks": {name: attack.to_json() for name, attack in report.attacks.items()},
        "seconds": report.cost.seconds,
        "peak_memory_bytes": report.cost.peak_memory_bytes,
        "parameters_changed": report.cost.parameters_changed,
        "bytes": sum(x.numel() * x.element_size() for x in changed_tensors(before, after)),
    }


def sides(report: AuditReport, pipe: Text2Image) -> tuple[list[str], list[str]]:
    """(the retained concepts that are near to the erased ones, those that are far).

    Near is what the audit's cases call so (of the same kind as a concept); where they do not say, the half of the
    retained concepts that the model's text encoder puts nearest to an erased one.
    """
    groups: Mapping[str, Sequence[str]] = report.protocol["groups"]
    near = {word for name, words in groups.items() if name.startswith("Near") for word in words}
    said = any(name.startswith(("Near", "Far")) for name in groups)
    if not said and len(report.retention) > 1:
        near = set(nearest(pipe, list(report.concepts), list(report.retention)))
    return [w for w in report.retention if w in near], [w for w in report.retention if w not in near]


def nearest(pipe: Text2Image, concepts: Sequence[str], words: Sequence[str]) -> list[str]:
    """The half of ``words`` with the largest cosine between the embedding of its last word and a concept's."""
    cond = pipe.encode([*concepts, *words])
    rows = cond.tokens[torch.arange(len(cond)), pipe.last_word_token(cond)].double()
    rows = rows / rows.norm(dim=-1, keepdim=True)
    likeness = (rows[len(concepts) :] @ rows[: len(concepts)].T).amax(1)
    return [words[i] for i in likeness.argsort(descending=True, stable=True)[: (len(words) + 1) // 2].tolist()]


def _plain(log: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(log, default=str), parse_constant=lambda name: None)
