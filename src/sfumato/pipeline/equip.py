"""Files of whatever can be attached to a pipeline, attached by what they say they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sfumato.foreign import read_tensors

from . import keys, membrane
from .base import Text2Image


def equip(pipe: Text2Image, model: object, files: Sequence[str | os.PathLike]) -> Text2Image:
    """``pipe`` with what is in all ``files`` attached: membranes (with facilitated transport), then keys.

    Args:
        model: what ``pipe`` was loaded from.
        files: adapter files of ``erase spm`` and key files of ``erase kpop``, or folders that hold one.

    Raises:
        BadInput: as `membrane.equip` and `keys.attach`.
    """
    unlocking = [file for file in files if _holds_keys(Path(file))]
    made = membrane.equip(pipe, model, [file for file in files if file not in unlocking])
    loaded = [key for file in unlocking for key in keys.load_keys(file)]
    return keys.attach(made, loaded) if loaded else made


def _holds_keys(path: Path) -> bool:
    """Whether a file says that it is one of keys; a folder, whether it has that and nothing else to attach."""
    if path.is_dir():
        return (path / keys.FILE).is_file() and not (path / membrane.ADAPTER).is_file()
    return path.is_file() and path.suffix == ".safetensors" and keys.HEADER in read_tensors(path)[1]
