"""The page of an edit: strips with a slider, masks over pictures, plots of what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sfumato import __version__
from sfumato.report.images import Embedded, embed, heat
from sfumato.report.page import SIDE, environment
from sfumato.report.words import number
from sfumato.text import shown

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.classify.parts.sheet import Figure as Plot
    from sfumato.edit.base import Edited, Figure

MOST = 240
"""Pictures of a page; where there are more, strips are shown with every second stop, or third ..."""


@dataclass(frozen=True)
class EditReport:
    """What the page shows.

    Attributes:
        method: its name.
        edited: what it made.
        names: of the pictures that were edited.
        prompts: one each.
        about: how it was made.
        command: the line that makes it again.
    """

    method: str
    edited: Edited
    names: Sequence[str]
    prompts: Sequence[str]
    about: Mapping[str, Any]
    command: str = ""


@dataclass(frozen=True)
class Curve:
    """A plot in shares of its width and in pixels of its height."""

    title: str
    across: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: dict[str, list[tuple[float, float, str]]]


def arrays(pictures: Tensor) -> UInt8[np.ndarray, "... side side 3"]:
    """Pictures in [0, 1], channels third from last, as bytes."""
    return (pictures.movedim(-3, -1).cpu().numpy() * 255).round().astype(np.uint8)


def render(report: EditReport) -> str:
    """The page as text."""
    edited, page = report.edited, environment().get_template("edit.html.j2")
    strips, told = arrays(edited.strips), shown({"names": list(report.names), "prompts": list(report.prompts)})
    n, tracks, stops = strips.shape[:3]
    every = max(1, -(-n * tracks * stops // MOST))
    kept = sorted({*range(0, stops, every), edited.plain, stops - 1})
    before = None if edited.before is None else arrays(edited.before)
    rows = []
    for i in range(n):
        row = {
            "name": told["names"][i], "prompt": told["prompts"][i],
            "before": None if before is None else embed(before[i], SIDE),
            "strips": {t: [embed(strips[i, k, j], SIDE) for j in kept] for k, t in enumerate(edited.tracks)},
            "maps": {label: _laid(x[i], strips.shape[3:5]) for label, x in edited.maps.items()},
            "errors": {k: x[i] for k, x in edited.told.get("errors", {}).items()},
            "told": dict(edited.told["pictures"][i]) if "pictures" in edited.told else {},
        }  # fmt: skip
        rows.append(row)
    about = shown(json.loads(json.dumps(report.about, default=str)))
    return page.render(
        report=report, rows=rows, stops=[edited.stops[j] for j in kept], plain=kept.index(edited.plain),
        curves=[curve(figure) for figure in edited.figures], about=about, version=__version__,
        facts={k: v for k, v in edited.told.items() if k not in ("pictures", "errors", "analysis")},
    )  # fmt: skip


def curve(figure: Figure | Plot) -> Curve:
    """A plot of 300 pixels in height, both axes from the least to the greatest value."""
    points = [p for line in figure.lines.values() for p in line] or [(0.0, 0.0)]
    (x0, x1), (y0, y1) = [(min(v), max(v)) for v in zip(*points, strict=True)]
    y0 = min(y0, 0.0)
    wide, high = (x1 - x0) or 1.0, (y1 - y0) or 1.0
    at = lambda x, y: (4 + 92 * (x - x0) / wide, 250 - 230 * (y - y0) / high)
    lines = {name: [(*at(x, y), f"{number(x)}: {number(y)}") for x, y in line] for name, line in figure.lines.items()}
    x_ticks = [(at(x, y0)[0], number(x)) for x in np.linspace(x0, x1, 5).tolist()]
    y_ticks = [(at(x0, y)[1], number(y)) for y in np.linspace(y0, y1, 4).tolist()]
    return Curve(figure.title, figure.across, x_ticks, y_ticks, shown(lines))


def _laid(share: Tensor, size: tuple[int, ...]) -> Embedded:
    """A map in [0, 1] in the colours of heat, as large as the picture that it belongs to."""
    picture = Image.fromarray(heat(share.cpu().double().numpy()))
    return embed(np.asarray(picture.resize((size[1], size[0]), Image.Resampling.NEAREST)), SIDE)
