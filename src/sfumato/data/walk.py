"""Which files of a folder are pictures, and what was left out and why."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
OTHERS = {".svg", ".heic", ".heif", ".avif", ".jxl", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".exr", ".jp2"}
"""Pictures of kinds that are not read."""
SYSTEM = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}
"""Folders that systems leave behind, with copies or thumbnails of the pictures."""


def hidden(parts: tuple[str, ...]) -> bool:
    """Whether a path's parts say that a system or an editor put the file there: .ipynb_checkpoints/, __MACOSX/, ._x."""
    return any(part.startswith(".") or part in SYSTEM for part in parts)


def walk(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The pictures of a folder, its subfolders and linked folders in name order; what was left out, by reason."""
    files, left = [], Counter[str]()
    for file in _files(folder):
        suffix = file.suffix.lower()
        if suffix not in SUFFIXES | OTHERS:
            continue
        if hidden(file.relative_to(folder).parts):
            left["hidden or left by a system"] += 1
        elif suffix in OTHERS:
            left[f"{suffix}, which is not read"] += 1
        elif not file.is_file():
            left["broken links"] += 1
        else:
            files.append(file)
    return in_place(files, folder), left


def in_place(files: Iterable[Path], folder: Path) -> list[Path]:
    """Files or folders in ``folder`` in the order of their names: 2 before 10, and 01 before 1."""
    names = ((f.relative_to(folder).as_posix(), f) for f in files)
    return [file for _, _, file in sorted((in_order(name), name, file) for name, file in names)]


def in_order(name: str) -> tuple[tuple[str | int, ...], ...]:
    """A key by which names sort as people count: 2 before 10. Names that differ in zeros before a number are alike."""
    return tuple(
        tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", piece)))
        for piece in unicodedata.normalize("NFC", name).split("/")
    )


def _files(folder: Path) -> Iterator[Path]:
    """All files, in linked folders too; no folder twice, so that links in a circle end."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        yield from (Path(place, name) for name in names)
