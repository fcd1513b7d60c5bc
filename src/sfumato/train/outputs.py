"""Where a run's result is to stand: is it there already, or is something else in its way?"""

from __future__ import annotations

import contextlib
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


def _flat(made: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a result, by name."""
    parent = made.get("parent") or {}
    kept = {name: value for name, value in made["config"].items() if name not in NEUTRAL}
    return plain({"recipe": made.get("recipe"), **kept, **({"teacher or start": parent["sha256"]} if parent else {})})
