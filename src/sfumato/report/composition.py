"""A chain's report: erasure and retention after every link, and the link that breaks the erasure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sfumato import __version__
from sfumato.files import atomic_folder
from sfumato.report.audit import AuditReport
from sfumato.report.images import Embedded, embed
from sfumato.report.page import SIDE, axis, environment
from sfumato.report.schema import Interval
from sfumato.report.words import average, full, kept, seconds
from sfumato.text import shown

PICTURES = 8
"""Of each stage, on the same seeds."""


@dataclass(frozen=True)
class Stage:
    """The model after a link: its audit, how long the link took, and what it has to say of what it did."""

    title: str
    report: AuditReport
    seconds: float
    said: str = ""

    @property
    def erased(self) -> Interval | None:
        return average([self.report.erasure.get(c) for c in self.report.concepts])

    @property
    def kept(self) -> Interval | None:
        return kept(self.report)

    @property
    def moved(self) -> Interval | None:
        return None if self.report.integrity is None else self.report.integrity.mean

    @property
    def recovered(self) -> dict[str, Interval | None]:
        return {name: attack.recovered for name, attack in self.report.attacks.items()}

    def to_json(self) -> dict[str, Any]:
        told = {"erased": self.erased, "kept": self.kept, "integrity": self.moved}
        return {
            "link": self.title, "seconds": self.seconds,
            **{name: i and i.to_json("value") for name, i in told.items()},
            "recovered": {name: i and i.to_json("value") for name, i in self.recovered.items()},
            **({"said": self.said} if self.said else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class Composition:
    """The stages of a chain; the first is the edited model itself.

    Attributes:
        refused: what could not be done, and why.
        apart: each link happened to the edited model itself.
    """

    stages: Sequence[Stage]
    reproduce: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False

    @cached_property
    def broken_by(self) -> int | None:
        """The first link after which less is erased than by the edit alone, beyond both intervals; None: none does."""
        return next((k for k in range(1, len(self.stages)) if self.breaks(k)), None)

    def breaks(self, k: int) -> bool:
        """Whether less is erased after link ``k`` than by the edit alone, beyond both intervals."""
        first, now = self.stages[0].erased, self.stages[k].erased
        return bool(first and now and first.low is not None and now.high is not None and now.high < first.low)

    @property
    def verdict(self) -> str:
        """One sentence, and where a chain ended early another."""
        if self.apart or not self.refused:
            return self._survives
        (link, why), *_ = self.refused.items()
        return f"{self._survives} The link {link} could not be, so that nothing was measured from there on: {why}."

    @property
    def heading(self) -> str:
        """The same in a few words."""
        if self.stages[0].erased is None:
            return "whether the erasure survives was not measured"
        broken = [stage.title for k, stage in enumerate(self.stages) if k and self.breaks(k)]
        if not broken:
            return "no link is seen to break the erasure"
        return f"broken by {', '.join(broken if self.apart else broken[:1])}"

    @property
    def _survives(self) -> str:
        first, last = self.stages[0].erased, self.stages[-1].erased
        if first is None or last is None:
            return "Whether the erasure survives was not measured."
        broken = [stage.title for k, stage in enumerate(self.stages) if k and self.breaks(k)]
        if self.apart and broken:
            return f"Erased in {full(first)}; broken by {', '.join(broken)}, each by itself."
        if self.broken_by is None:
            if self.apart:
                return f"Erased in {full(first)}; none of the links is seen to break it by itself beyond the intervals."
            told = f"{full(first)} at first, {full(last)} at the end"
            return f"No link is seen to break the erasure beyond the intervals: {told}."
        stage = self.stages[self.broken_by]
        told = f"erased in {full(stage.erased)}, before in {full(first)}"
        return f"Broken by link {self.broken_by}, {stage.title}: {told}."

    def to_json(self) -> dict[str, Any]:
        return {
            "concepts": list(self.stages[0].report.concepts), "broken_by": self.broken_by, "verdict": self.verdict,
            "stages": [{**stage.to_json(), "breaks": self.breaks(k)} for k, stage in enumerate(self.stages)],
            "refused": dict(self.refused), "apart": self.apart, "reproduce": self.reproduce, "sfumato": __version__,
        }  # fmt: skip

    def rows(self) -> list[tuple[str, ...]]:
        """For a terminal: link, erased, kept, recovered."""
        names = list(self.stages[0].recovered)
        return [
            (s.title, full(s.erased), full(s.kept), *(full(s.recovered[n]) for n in names),
             seconds(s.seconds) if k else "")
            for k, s in enumerate(self.stages)
        ]  # fmt: skip

    @property
    def header(self) -> tuple[str, ...]:
        return ("after", "erased", "kept", *(f"recovered by {n}" for n in self.stages[0].recovered), "link took")

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write ``composition.json``, ``index.html``, and each stage's own audit under ``stages/``: all or nothing."""
        words = [re.sub("[^a-z0-9]+", "-", stage.title.lower()).strip("-")[:60] for stage in self.stages]
        names = [f"{k:02d}-{word}" for k, word in enumerate(words)]
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
            (temporary / "composition.json").write_text(text + "\n", encoding="utf-8")
            (temporary / "index.html").write_text(self.page(names), encoding="utf-8")
            (temporary / "stages").mkdir()
            for name, stage in zip(names, self.stages, strict=True):
                stage.report.save(temporary / "stages" / name)
        return Path(folder)

    def page(self, names: Sequence[str], alone: bool = False) -> str:
        """The page, whose stages lead to the audits in folders of these names; to none where it is ``alone``."""
        stages = [
            {
                "title": shown(s.title), "erased": s.erased, "kept": s.kept, "moved": s.moved,
                "recovered": s.recovered, "seconds": s.seconds, "link": "" if alone else f"stages/{name}/index.html",
                "pictures": shown(_pictures(s)), "breaks": self.breaks(k), "said": shown(s.said),
            }
            for k, (s, name) in enumerate(zip(self.stages, names, strict=True))
        ]  # fmt: skip
        before = _pictures(self.stages[0], before=True)
        limits = axis([x for s in self.stages for x in (s.erased, s.kept)])
        return environment().get_template("composition.html.j2").render(
            composition=self, stages=stages, before=shown(before), concepts=shown(list(self.stages[0].report.concepts)),
            verdict=shown(self.verdict), heading=shown(self.heading), refused=shown(dict(self.refused)),
            axis=limits, version=__version__, protocol=shown(self.stages[0].report.protocol),
        )  # fmt: skip


def _pictures(stage: Stage, before: bool = False) -> dict[str, list[tuple[Embedded, str]]]:
    """Concept -> the first pictures, each with its prompt and seed."""
    gallery = stage.report.gallery
    return {
        concept: [
            (embed(p.before if before else p.after, SIDE // 2), f"{p.prompt}, seed {p.seed}") for p in pairs[:PICTURES]
        ]
        for concept, pairs in (gallery.targets if gallery else {}).items()
    }
