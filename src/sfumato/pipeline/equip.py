"""Files of whatever can be attached to a pipeline, attached by what they say they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sfumato.foreign import read_tensors

from . import customization, keys, membrane
from .base import Text2Image


def equip(pipe: Text2Image, model: object, files: Sequence[str | os.PathLike]) -> Text2Image:
    """``pipe`` with what is in all ``files`` attached: words, membranes (with facilitated transport), keys, products.

    Args:
        model: what ``pipe`` was loaded from.
        files: files of ``customize``, adapter files of ``erase spm`` and key files of ``erase kpop``, or folders that
            hold one, and LoRA files.

    Raises:
        BadInput: as `customization.load`, `membrane.equip` and `keys.attach`.
    """
    custom = [file for file in files if customization.holds_one(file)]
    learned = [customization.load(file, pipe) for file in custom]
    made = customization.add_words(pipe, learned) if learned else pipe
    unlocking = [file for file in files if _holds_keys(Path(file))]
    made = membrane.equip(made, model, [file for file in files if file not in (*unlocking, *custom)])
    loaded = [key for file in unlocking for key in keys.load_keys(file)]
    made = keys.attach(made, loaded) if loaded else made
    for i, one in enumerate(learned):
        customization.add_products(made, f"custom.{i}", one.products)
    return made


def _holds_keys(path: Path) -> bool:
    """Whether a file says that it is one of keys; a folder, whether it has that and nothing else to attach."""
    if path.is_dir():
        return (path / keys.FILE).is_file() and not (path / membrane.ADAPTER).is_file()
    return path.is_file() and path.suffix == ".safetensors" and keys.HEADER in read_tensors(path)[1]
