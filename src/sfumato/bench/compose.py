"""The bench of compositions: erasers x what happens to models afterwards, on one model."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfumato import catalog
from sfumato.audit import Audit
from sfumato.audit.chain import Cast, Chain, Export, FineTune, Link, Merge, Scheduler, titles
from sfumato.cells import Failed
from sfumato.errors import BadInput
from sfumato.foreign import read_json, shaped
from sfumato.pipeline import load_text2image
from sfumato.plan import Plan, human_time
from sfumato.report.fates import Fate, FatesReport
from sfumato.text import counted
from sfumato.versions import versions

from .cell import Cell, known
from .erase import CELL, Bench

ERASED = "erased"


def usual(model: Any) -> tuple[Link, ...]:
    """What happens to most models: fine-tuning, merging, other precision, tools and sampler, a patch, fewer steps."""
    from sfumato.audit.chain import By
    from sfumato.distill.multistep_cm import MultistepCM
    from sfumato.steer.faster_diffusion import FasterDiffusion

    name = model if isinstance(model, str) else "sketch"
    # A quarter of the preset's updates: four steps learn quickly, and there is one such student for each cell.
    student = {**MultistepCM.settings_for(model), "sampling_steps": 4, "updates": 500, "anneal": 250, "track": "none"}
    tuned = FineTune(**FineTune.settings_for(model))
    return (
        tuned, Merge(model=name, weight=0.3), Cast(dtype="bfloat16"), Export(format="lora", rank=4), Scheduler(),
        By(FasterDiffusion(**FasterDiffusion.settings_for(model))), By(MultistepCM(**student)),
    )  # fmt: skip


def measured(cell: Cell, folder: Path | None = None) -> dict[str, Any]:
    """The cell's stages (JSON types), with the ``page`` and ``original``, as `sfumato.bench.cell.measure`.

    Raises:
        BadInput: the method does not fit the model, or the settings are none.
    """
    began = time.perf_counter()
    settings = dict(cell.audit)
    links, attacks = settings.pop("links"), settings.pop("attacks", ())
    pipe = load_text2image(settings.pop("before"), settings.get("device"), None, settings.get("prediction"))
    eraser = catalog.get(cell.method, "erase").load()(concepts=cell.concepts, seed=cell.seed, **cell.settings)
    erased, _ = eraser.run(pipe)
    tried = [catalog.get(name, "attack").load()(**chosen) for name, chosen in attacks]
    told = {**settings, "attacks": tried, "seed": cell.seed, "edit": eraser, "progress": False}
    audit = Audit(before=pipe, after=erased, concepts=cell.concepts, **told)
    original, unknown = known(cell, audit, audit.prepare(), folder)
    made = Chain(audit=audit, links=links, apart=True).run(original=original)
    names = [f"stage-{k}" for k in range(len(made.stages))]
    return {
        "report": made.to_json(), "page": made.page(names, alone=True), "seconds": time.perf_counter() - began,
        "original": unknown,
        "settings": {k: v for k, v in asdict(eraser).items() if k not in ("concepts", "seed")},
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fates(Bench):
    """Erases with every method, and audits what each thing that happens to a model afterwards leaves of the erasure.

    A cell is one method that takes one set of concepts out at one seed; each link happens to its result by itself.
    Cells are kept, resumed and spread as those of `Bench` are; `run` writes ``fates.json`` and gives a `FatesReport`.

    Cost: an audit without the original's pictures for each method, link, set of concepts and seed, and what links take.
    """

    links: tuple[Link, ...] = ()
    """What happens afterwards; by default what happens to most models."""
    attacks: tuple[str, ...] | None = ()
    """Of the verb attack; by default none."""

    measuring = staticmethod(measured)

    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := [link.title for i, link in enumerate(self.links) if link in self.links[:i]]:
            raise BadInput(f"{twice[0]!r} is named twice among the links: name each once")

    @property
    def afterwards(self) -> tuple[Link, ...]:
        # Few steps are learned from pictures of the model's world, which is known of the sketch world's alone.
        return self.links or usual(self.model)[: None if self.pipe.vocabulary else -1]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "links": self.afterwards}

    def _spent(self, result: Mapping[str, Any]) -> str:
        return human_time(result["seconds"])

    def _report(self, folder: Path, cells: Sequence[Cell], lost: Mapping[str, Failed], reproduce: str) -> FatesReport:
        return FatesReport(
            [fate for cell in cells for fate in fates(folder, cell, lost)],
            links=[ERASED, *titles(self.afterwards)],
            configuration={k: str(v) if k == "links" else v for k, v in asdict(self).items()},
            model_hash=cells[0].model_hash,
            versions=versions(),
            reproduce=reproduce,
        )

    def _plan(self, out: str | os.PathLike, cells: Sequence[Cell], left: Sequence[Cell]) -> Plan:
        title = f"{counted(len(cells), 'cell')} of {counted(len(self.afterwards), 'link')}, {self.jobs} at a time"
        if len(left) < len(cells):
            title += f"; {len(cells) - len(left)} were finished before"
        return Plan(
            title, time="an audit for each link of each cell, and what methods and links take",
            writes=[f"{out}/ (index.html, table.md, fates.json, and a page for each cell)"],
        )  # fmt: skip


def fates(folder: Path, cell: Cell, lost: Mapping[str, Failed]) -> list[Fate]:
    """What is known of a cell, a row for each link."""
    where = folder / "cells" / cell.key
    about: dict[str, Any] = {"method": cell.method, "concepts": cell.concepts, "seed": cell.seed}
    if not where.exists():
        return [Fate(**about, link=ERASED, why=lost[cell.key].reason)] if cell.key in lost else []
    advice = f"remove {where}, and it is measured again"
    read_json(where / CELL, advice=advice)
    told = read_json(where / "report.json", {"stages": list, "refused": dict}, advice)
    page = f"cells/{cell.key}/index.html" if (where / "index.html").exists() else ""
    for stage in told["stages"]:
        shaped(stage, {"link": str, "erased": dict | None, "kept": dict | None}, where / "report.json", advice)
    made = [Fate(**about, link=s["link"], figures=s, page=page) for s in told["stages"]]
    return made + [Fate(**about, link=link, why=why, page=page) for link, why in told["refused"].items()]
