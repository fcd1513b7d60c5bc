"""Where a run's result is to stand: is it there already, or is something else in its way?"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import BadInput
from sfumato.files import clear_inside, held
from sfumato.pipeline import read_record
from sfumato.progress import alone

from .schedule import NEUTRAL
from .state import plain


def ours(out: Path) -> contextlib.AbstractContextManager[Path]:
    """The folder of a run, for its processes alone; see `sfumato.files.held`. One of them holds it for all."""
    return held(out) if alone() else contextlib.nullcontext(out)


def is_there(target: Path, made: Mapping[str, Any], overwrite: bool = False) -> bool:
    """Whether ``target`` is what a run that makes ``made`` wrote, so that nothing is left to do.

    Args:
        target: the folder of the model.
        made: as in the record of an output: recipe, config, and the parent if there is one.
        overwrite: what is there is to be replaced, whatever it is.

    Raises:
        BadInput: something else is there.
    """
    if overwrite or not target.exists():
        return False
    record = read_record(target).get("provenance") if target.is_dir() else None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise BadInput(
            f"{target} is in the way and no result of this run: move it, choose another folder, or add --overwrite to "
            "replace it"
        )
    ours, theirs = _flat(made), _flat(record)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise BadInput(
                f"{target} was made with {name}={theirs.get(name)!r}, and this run has {name}={ours.get(name)!r}: "
                "choose another folder, or add --overwrite to replace it"
            )
    if alone():
        clear_inside(target.parent)  # a kill after the last renaming
    return True


class InFolder(ABC):
    """A run that lives in a folder and leaves its model in ``model`` there."""

    @abstractmethod
    def made(self) -> dict[str, Any]:
        """How the model is made, for its record."""

    @abstractmethod
    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        """Train, or go on, in a folder that is this run's alone."""

    def finished(self, out: str | Path, overwrite: bool = False) -> bool:
        """Whether ``out/model`` is the model of this run already, so that `run` has nothing left to do.

        Raises:
            BadInput: something else is there.
        """
        return is_there(Path(out) / "model", self.made(), overwrite)

    def run(self, out: str | Path, progress: bool = True, overwrite: bool = False) -> Path:
        """Train, or go on training, and write the model to ``out/model``; a `finished` run is left as it is.

        Raises:
            BadInput: ``out`` is a file or holds a run with other settings, or another process is at work in it;
                something else is in the model's place (without ``overwrite``); the data, or what it starts from,
                cannot be used.
        """
        with ours(Path(out)) as folder:
            if not self.finished(folder, overwrite):
                self._run(folder, progress, overwrite)
        return Path(out) / "model"


def _flat(made: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a result, by name."""
    parent = made.get("parent") or {}
    kept = {name: value for name, value in made["config"].items() if name not in NEUTRAL}
    return plain({"recipe": made.get("recipe"), **kept, **({"teacher or start": parent["sha256"]} if parent else {})})
