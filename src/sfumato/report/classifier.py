"""The page of a trained classifier: what it learned, as pictures, and how sure it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato import __version__
from sfumato.files import atomic_file, write_json
from sfumato.report.edit import curve
from sfumato.report.images import Embedded, embed
from sfumato.report.page import SIDE, environment
from sfumato.report.words import number
from sfumato.text import shown

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.classify.parts.sheet import Sheet


@dataclass(frozen=True)
class ClassifierReport:
    """What the page shows.

    Attributes:
        method: its name.
        about: its settings.
        card: how good it is, of the classifier's ``card.json``.
        sheets: of `sfumato.classify.base.Classifier.sheets`.
        reproduce: the line that makes it again.
    """

    method: str
    about: Mapping[str, Any]
    card: Mapping[str, Any]
    sheets: Sequence[Sheet] = field(default=(), repr=False)
    reproduce: str = ""

    def to_json(self) -> dict[str, Any]:
        """All but the pictures."""
        sheets = [
            {"title": s.title, "told": dict(s.told), "rows": [{"name": r.name, **r.told} for r in s.rows],
             "figures": {f.title: dict(f.lines) for f in s.figures}}
            for s in self.sheets
        ]  # fmt: skip
        return {"method": self.method, "settings": dict(self.about), "card": dict(self.card), "sheets": sheets}

    def render(self) -> str:
        """The page, which asks the network for nothing."""
        sections = [
            {
                "title": s.title, "about": s.about, "told": _read(s.told), "curves": [curve(f) for f in s.figures],
                "rows": [{"name": r.name, "told": _read(r.told), "pictures": [(c, _embedded(x)) for c, x in r.pictures]}
                         for r in s.rows],
            }
            for s in self.sheets
        ]  # fmt: skip
        about = json.loads(json.dumps({"settings": self.about, "card": self.card}, default=str))
        return environment().get_template("classifier.html.j2").render(
            method=self.method, sections=shown(sections), about=shown(about), card=shown(_read(self.card)),
            reproduce=shown(self.reproduce), version=__version__,
        )  # fmt: skip

    def write(self, folder: Path) -> None:
        """``index.html`` and ``report.json`` into the folder of the run."""
        with atomic_file(folder / "index.html", overwrite=True) as temporary:
            temporary.write_text(self.render(), encoding="utf-8")
        write_json(folder / "report.json", self.to_json(), overwrite=True)


def _read(told: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as one reads them: rounded, an interval behind its value, and those that belong together on a line."""
    return {name: _figure(value) for name, value in told.items()}


def _figure(value: Any) -> Any:
    if isinstance(value, Mapping):
        if {"value", "low", "high", "n"} <= value.keys():
            bounds = "" if value["low"] is None else f" [{number(value['low'])}, {number(value['high'])}]"
            return f"{number(value['value'])}{bounds} of {value['n']}"
        return "; ".join(f"{name} {_figure(x)}" for name, x in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_figure(x)) for x in value) or "none"
    return number(value) if isinstance(value, float) else value


def _embedded(picture: Tensor) -> Embedded:
    """A picture in [-1, 1], channels first."""
    x = picture.detach().cpu().double().clamp(-1, 1).movedim(0, -1).numpy()
    return embed(((x + 1) * 127.5).round().astype(np.uint8), SIDE)
