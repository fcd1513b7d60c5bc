"""Files of whatever can be attached to a pipeline, attached by what they say they are."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sfumato.errors import BadInput
from sfumato.foreign import read_tensors

from . import customization, keys, membrane
from .base import Text2Image

File = str | os.PathLike | tuple[str | os.PathLike, float]
"""A file or folder; with the strength of what is in it as a pair, or behind a colon: "mine.safetensors:0.8"."""


def equip(pipe: Text2Image, model: object, files: Sequence[File]) -> Text2Image:
    """``pipe`` with what is in all ``files`` attached: words, membranes, keys, products; itself if there are none.

    Words and products act at their strength, 1 by default; membranes act with facilitated transport, which is their
    strength.

    Args:
        model: what ``pipe`` was loaded from.
        files: files of ``customize``, adapter files of ``erase spm`` and key files of ``erase kpop``, or folders that
            hold one, and LoRA files.

    Raises:
        BadInput: as `customization.load`, `membrane.load_membranes`, `membrane.attach`, `keys.add` and
            `Text2Image.load_adapter`; a strength for what has none; ``model`` is a folder with membranes merged in.
    """
    if not files:
        return pipe
    asked = [(path, strength, _kind(path)) for path, strength in map(with_strength, files)]
    of = lambda kind: [path for path, _, k in asked if k == kind]
    learned = [(customization.load(path, pipe), path, strength) for path, strength, k in asked if k == "words"]
    wordy = [path for one, path, strength in learned if strength != 1 and not one.products]
    fixed = [path for path, strength, k in asked if strength != 1 and k in ("membranes", "keys")]
    if wordy or fixed:
        what = f"{wordy[0]} holds words alone" if wordy else f"{fixed[0]} holds no plain products"
        raise BadInput(f"{what}, which have no strength: leave it at 1")
    if (erasing := of("membranes")) and membrane.holds_membranes(model):
        raise BadInput(
            f"the weights in {model} have its adapters merged in already: attach adapters to the model that they were "
            "made from"
        )
    made = customization.add_words(pipe, [one for one, _, _ in learned]) if learned else pipe
    membranes = [one for path in erasing for one in membrane.load_membranes(path, made)]
    made = membrane.attach(made, membranes) if membranes else made.copy()
    loras = [(path, strength) for path, strength, k in asked if k == "lora"]
    files_of = lambda path: membrane.loras_in(path) if path.is_dir() else [path]
    for i, (file, strength) in enumerate((file, strength) for path, strength in loras for file in files_of(path)):
        made.load_adapter(f"lora.{i}", file).scale = strength
    keys.add(made, [key for path in of("keys") for key in keys.load_keys(path)])
    for i, (one, _, strength) in enumerate(learned):
        customization.add_products(made, f"custom.{i}", one.products, strength)
    return made


def with_strength(file: File) -> tuple[Path, float]:
    """The path, and the strength that stands behind it."""
    path, strength = file if isinstance(file, tuple) else (file, 1.0)
    name, colon, told = str(path).rpartition(":")
    if colon and not Path(path).exists() and Path(name).exists():
        try:
            path, strength = name, float(told)
        except ValueError:
            raise BadInput(f"{told!r} behind {name} is no strength: give a number, as in {name}:0.8") from None
    if not math.isfinite(strength):
        raise BadInput(f"the strength of {path} must be a finite number, got {strength}")
    return Path(path), float(strength)


def _kind(path: Path) -> Literal["words", "keys", "membranes", "lora"]:
    if customization.holds_one(path):
        return "words"
    if _holds_keys(path):
        return "keys"
    return "membranes" if membrane.is_membrane(path) else "lora"


def _holds_keys(path: Path) -> bool:
    """Whether a file says that it is one of keys; a folder, whether it has that and nothing else to attach."""
    if path.is_dir():
        return (path / keys.FILE).is_file() and not (path / membrane.ADAPTER).is_file()
    return path.is_file() and path.suffix == ".safetensors" and keys.HEADER in read_tensors(path)[1]
