"""The page of views: what cameras along a path see of a scene, before and after its slots were edited."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sfumato import __version__
from sfumato.report.images import embed
from sfumato.report.page import SIDE, environment
from sfumato.text import shown

MOST = 240
"""Pictures of a page; where there are more, every second view is shown, or third ..."""


@dataclass(frozen=True)
class ViewsReport:
    """What the page shows.

    Attributes:
        tracks: for each way to draw the scene all its views, by name.
        views: what the views are called.
        about: how they were made.
        command: the line that makes them again.
    """

    tracks: Mapping[str, UInt8[np.ndarray, "view side side 3"]]
    views: Sequence[str]
    about: Mapping[str, Any]
    command: str = ""


def render(report: ViewsReport) -> str:
    """The page as text."""
    every = max(1, -(-len(report.tracks) * len(report.views) // MOST))
    kept = range(0, len(report.views), every)
    tracks = {name: [embed(pictures[i], SIDE) for i in kept] for name, pictures in report.tracks.items()}
    about = shown(json.loads(json.dumps(report.about, default=str)))
    return environment().get_template("views.html.j2").render(
        tracks=tracks, views=[report.views[i] for i in kept], about=about, command=shown(report.command),
        version=__version__,
    )  # fmt: skip
