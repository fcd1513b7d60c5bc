"""The page of steering: pictures with and without the patches, on the same seeds, and where they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sfumato import __version__
from sfumato.report.images import difference, embed, heat
from sfumato.report.page import SIDE, environment
from sfumato.text import shown

Pictures = UInt8[np.ndarray, "n height width 3"]

MOST = 80
"""Pictures of a page: the first ones, never a choice of good ones."""


@dataclass(frozen=True)
class SteerReport:
    """What the page shows.

    Attributes:
        methods: names of the patches, in their order.
        steered: the pictures drawn under them.
        plain: the same without; None where they were not drawn.
        labels: what was asked for and with which seed, one each.
        about: how it was made.
        seconds: how long each of the two took ("steered", "plain").
        command: the line that makes it again.
    """

    methods: Sequence[str]
    steered: Pictures
    plain: Pictures | None
    labels: Sequence[str]
    about: Mapping[str, Any]
    seconds: Mapping[str, float]
    command: str = ""


def changes(steered: Pictures, plain: Pictures) -> list[float]:
    """Mean difference of every picture from its plain one, in shares of the full range."""
    return [float(difference(a, b).mean()) for a, b in zip(plain, steered, strict=True)]


def render(report: SteerReport) -> str:
    """The page as text."""
    rows, drawn = [], report.plain is not None
    # a patch may draw at another size than the model's own: then pixels have no partners
    alike = report.plain is not None and report.plain[0].shape == report.steered[0].shape
    for i, label in enumerate(shown(list(report.labels))[:MOST]):
        row = {"label": label, "steered": embed(report.steered[i], SIDE), "plain": None, "change": None}
        if report.plain is not None:
            row["plain"] = embed(report.plain[i], SIDE)
        if report.plain is not None and alike:
            row["change"] = embed(heat(difference(report.plain[i], report.steered[i])), SIDE)
        rows.append(row)
    moved = changes(report.steered, report.plain) if report.plain is not None and alike else []
    about = shown(json.loads(json.dumps(report.about, default=str)))
    return environment().get_template("steer.html.j2").render(
        report=report, rows=rows, of=len(report.labels), moved=moved, drawn=drawn, about=about, version=__version__,
        unchanged=sum(x == 0 for x in moved), names=" and ".join(report.methods),
    )  # fmt: skip
