"""What has been measured, kept as it comes, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import BadInput
from sfumato.files import clear_leftovers, write_json
from sfumato.foreign import read_json

NAME = "points.json"


class Kept:
    """Points by name, in ``folder/points.json`` or, without a folder, in memory.

    Args:
        about: what the points depend on, in JSON's types.

    Raises:
        BadInput: the folder holds points of something else; the differing setting is named.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]):
        self.file, self.about = None if folder is None else Path(folder) / NAME, json.loads(json.dumps(about))
        self.points: dict[str, Any] = {}
        if self.file is None:
            return
        clear_leftovers(self.file)
        if not self.file.exists():
            return
        found = read_json(self.file, {"about": dict, "points": dict})
        for name in {**self.about, **found["about"]}:
            ours, theirs = self.about.get(name), found["about"].get(name)
            if ours != theirs:
                raise BadInput(
                    f"{folder} holds points measured with {name}={theirs!r}, and this run has {name}={ours!r}: use the "
                    "same setting to go on, or another folder to start anew"
                )
        self.points = found["points"]

    def keep(self, name: str, point: Any) -> None:
        """Add one point, and write all."""
        self.points[name] = point
        if self.file is not None:
            write_json(self.file, {"about": self.about, "points": self.points}, overwrite=True)
