"""The table and page of a bench of compositions: erasers by what happens to models afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sfumato.files import atomic_file, write_json
from sfumato.report.bench import over
from sfumato.report.page import environment
from sfumato.report.schema import Interval
from sfumato.report.words import MISSING, bounds, value
from sfumato.text import counted, shown


@dataclass(frozen=True)
class Fate:
    """What one link left of one erasure: its ``figures`` (a stage of ``composition.json``), or ``why`` not."""

    method: str
    concepts: Sequence[str]
    seed: int
    link: str
    figures: Mapping[str, Any] | None = None
    page: str = ""
    why: str = ""

    def interval(self, name: str) -> Interval | None:
        """A figure of this link alone, over pictures."""
        return Interval.from_json((self.figures or {}).get(name), "value")


@dataclass(frozen=True)
class Square:
    """A method under a link, over sets of concepts; the intervals of a single cell are those over its pictures."""

    erased: Interval | None
    kept: Interval | None
    broken: int
    cells: int
    why: str = ""


@dataclass(frozen=True)
class FatesReport:
    """All fates, and how they were measured."""

    fates: Sequence[Fate]
    links: Sequence[str]
    configuration: Mapping[str, Any]
    model_hash: str
    versions: Mapping[str, str] = field(default_factory=dict)
    reproduce: str = ""

    @cached_property
    def rows(self) -> dict[str, list[Square]]:
        """Method -> a square for each link, those that keep the most of their erasure at the worst link first."""
        made = {m: [self._square(m, link) for link in self.links] for m in dict.fromkeys(f.method for f in self.fates)}
        least = lambda row: min((s.erased.value for s in row if s.erased and s.erased.value is not None), default=-1.0)
        return dict(sorted(made.items(), key=lambda item: least(item[1]), reverse=True))

    def _square(self, method: str, link: str) -> Square:
        mine = [f for f in self.fates if f.method == method and f.link == link]
        have = [f for f in mine if f.figures is not None]
        sets = [" + ".join(f.concepts) for f in have]
        mean = lambda found: found[0] if len(found) == 1 else over([i and i.value for i in found], sets)
        erased, kept = (mean([f.interval(name) for f in have]) for name in ("erased", "kept"))
        broken = sum(bool((f.figures or {}).get("breaks")) for f in have)
        return Square(erased, kept, broken, len(have), next((f.why for f in mine if f.why), ""))

    def to_json(self) -> dict[str, Any]:
        return {
            "fates": [asdict(f) for f in self.fates], "links": list(self.links), "model": self.model_hash,
            "configuration": dict(self.configuration), "versions": dict(self.versions), "reproduce": self.reproduce,
        }  # fmt: skip

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, as text: erased, and kept in brackets."""
        rows = [[method, *(_told(square) for square in row)] for method, row in self.rows.items()]
        return ["method", *self.links], rows

    def markdown(self) -> str:
        header, rows = self.table()
        line = lambda cells: "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"
        text = "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
        told = (
            "Erased, with its 95 % interval over sets of concepts (of one cell over its pictures); in brackets what is "
            "kept of other concepts, and the cells."
        )
        why = [f"- {method}, {link}: {why}" for method, link, why in self.refused]
        return "\n\n".join([text, told, *(["Not measured:", "\n".join(why)] if why else [])]) + "\n"

    @property
    def refused(self) -> list[tuple[str, str, str]]:
        """(method, link, why) of what could not be measured in some cell, each once."""
        return [(m, link, s.why) for m, row in self.rows.items() for link, s in zip(self.links, row, strict=True)
                if s.why]  # fmt: skip

    def write(self, folder: str | Path) -> None:
        """``fates.json``, ``table.md`` and ``index.html`` beside the cells, each whole."""
        folder = Path(folder)
        write_json(folder / "fates.json", self.to_json(), overwrite=True)
        page = environment().get_template("fates.html.j2").render(report=shown(self))
        for name, text in (("table.md", self.markdown()), ("index.html", page)):
            with atomic_file(folder / name, overwrite=True) as temporary:
                temporary.write_text(text, encoding="utf-8")


def _told(square: Square) -> str:
    if square.erased is None:
        return "refused" if square.why else MISSING
    erased, kept = (f"{value(i)} {bounds(i)}".strip() for i in (square.erased, square.kept))
    broken = f"; broken in {square.broken}" if square.broken else ""
    return f"{erased} (kept {kept}; {counted(square.cells, 'cell')}{broken})"
