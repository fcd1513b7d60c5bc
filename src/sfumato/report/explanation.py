"""The page of judged explanations: scores, curves of errors, and pictures as they were damaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.files import atomic_file
from sfumato.report.images import Embedded, embed
from sfumato.report.page import SIDE, environment
from sfumato.report.words import MISSING, number, percent
from sfumato.text import counted, shown

if TYPE_CHECKING:
    from torch import Tensor

LIMITS = (
    "A classifier that is trained again is another one: what it can still do without a feature is not what the first "
    "one did with it.",
    "Damage is made from the class, and may show it: where the leakage probe is often right, few errors say little.",
    "Maps without signs, or one for all channels, are blunt directions; moved along them, pictures tell less of them.",
    "A gradient is read as a direction in the Euclidean metric of pixels: other units of its axes, other lengths.",
)
WIDTH, HEIGHT = 520, 220
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")
TOLD = {
    "goar": "Errors after moving pictures against the attribution and training again.",
    "roar": "Errors after taking out the values that rank highest and training again.",
    "kar": "Errors after keeping only the values that rank highest and training again: here few speak for it.",
    "road": "Errors after imputing the pixels that rank highest.",
}


@dataclass(frozen=True)
class ExplanationReport:
    """What a judge of explanations found, as JSON types, and the pictures of its page.

    Attributes:
        figures: as the method gives them.
        labels: names of the classes.
        measured_on: which pictures errors are counted on, in words.
        strips: for each attribution (label, picture in [-1, 1]).
    """

    figures: Mapping[str, Any]
    labels: Sequence[str]
    measured_on: str
    method: Mapping[str, Any]
    classifier: str
    projector: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    reproduce: str = ""
    strips: Mapping[str, Sequence[tuple[str, Tensor]]] = field(default_factory=dict, repr=False)

    def rows(self) -> list[tuple[str, str, str]]:
        """Attribution, score, leakage probe; the best first."""
        found = self.figures["attributions"]
        ranking = self.figures["ranking"]
        return [(name, _figure(found[name]["score"]), _share(found[name]["leakage"])) for name in ranking]

    def findings(self) -> list[str]:
        """What the figures say, in sentences; no more than they say."""
        found, ranking = self.figures["attributions"], self.figures["ranking"]
        fewest = self.figures["metric"] == "kar"
        said = [f"The {'fewest' if fewest else 'most'} errors follow the damage of {ranking[0]}."]
        for better, worse in pairwise(ranking):
            pair = [found[name]["score"] for name in ((worse, better) if fewest else (better, worse))]
            if None in (pair[0]["low"], pair[1]["high"]):
                said.append("One run tells no interval: the order may be chance.")
                break
            if pair[0]["low"] <= pair[1]["high"]:
                said.append(f"The intervals of {better} and {worse} overlap: between them it is not decided.")
        right = 1 - self.figures["wrong"]["as it is"]
        for name in ranking:
            if (leak := found[name]["leakage"]) is not None and leak >= right:
                said.append(f"From the damage of {name} alone the class is read as well as from pictures: its errors "
                            "say nothing.")  # fmt: skip
        return said

    def to_json(self) -> dict[str, Any]:
        names = ("figures", "labels", "measured_on", "method", "classifier", "projector", "versions")
        return {**{name: getattr(self, name) for name in names}, "findings": self.findings()}

    def render(self) -> str:
        """The page, which asks the network for nothing."""
        found = self.figures["attributions"]
        curves = [
            {
                "name": name,
                "cells": [
                    {"retrained": _figure(p["retrained"], percent), "alone": _share(p["as it is"])}
                    for p in found[name]["curve"]
                ],
                "signed": found[name]["signed"],
            }
            for name in self.figures["ranking"]
        ]
        strips = [(name, self._strips(name)) for name in self.figures["ranking"] if self.strips.get(name)]
        wrong = self.figures["wrong"]
        context = {
            "report": shown({**self.to_json(), "reproduce": self.reproduce}), "rows": self.rows(), "curves": curves,
            "plot": self._plot(), "strips": strips, "limits": LIMITS, "width": WIDTH, "height": HEIGHT,
            "told": TOLD[self.figures["metric"]], "strengths": [f"{s:g}" for s in self.figures["strengths"]],
            "clean": _figure(wrong["retrained"], percent), "alone": _share(wrong["as it is"]),
            "pictures": [counted(n, "picture") for n in self.figures["pictures"].values()],
        }  # fmt: skip
        return environment().get_template("explanation.html.j2").render(context)

    def write(self, folder: Path) -> None:
        """``index.html`` into the folder of the figures."""
        with atomic_file(folder / "index.html", overwrite=True) as temporary:
            temporary.write_text(self.render(), encoding="utf-8")

    def _plot(self) -> list[dict[str, str]]:
        """A line of errors for each attribution, strengths at equal distances."""
        lines, n = [], len(self.figures["strengths"])
        for i, name in enumerate(self.figures["ranking"]):
            points = []
            for k, p in enumerate(self.figures["attributions"][name]["curve"]):
                share = p["as it is"] if p["retrained"] is None else p["retrained"]["value"]
                points.append(f"{10 + (WIDTH - 20) * (k + 0.5) / n:.1f},{10 + (HEIGHT - 20) * (1 - share):.1f}")
            lines.append({"name": name, "points": " ".join(points), "dash": DASHES[i % len(DASHES)]})
        return lines

    def _strips(self, name: str) -> list[list[tuple[str, Embedded]]]:
        """One row a test picture: it begins with the picture itself."""
        each = 2 + len(self.figures["strengths"])
        all_of = [(label, embed(_levels(x), SIDE)) for label, x in self.strips[name]]
        return [all_of[i : i + each] for i in range(0, len(all_of), each)]


def _levels(x: Tensor) -> np.ndarray:
    """A picture in [-1, 1], grey or in colour, as height x width x 3 in 256 levels."""
    x = x[:3] if len(x) >= 3 else x[:1].expand(3, -1, -1)
    array = (127.5 * (x.double().clamp(-1, 1) + 1)).round().byte().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(array)


def _figure(x: Mapping[str, Any] | None, as_words: Any = number) -> str:
    if x is None:
        return MISSING
    if x["low"] is None or x["high"] is None:
        return as_words(x["value"])
    return f"{as_words(x['value'])} [{as_words(x['low'])}, {as_words(x['high'])}]"


def _share(x: float | None) -> str:
    return MISSING if x is None else percent(x)
