"""Pictures in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sfumato.errors import BadInput

from .base import SUFFIXES, Pictures, to_square

CONDITION = ".cond"
"""Ends the stem of a picture that conditions another one: NAME.cond.png goes with NAME.jpg."""


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder and its subfolders in name order, without those that condition others.

    The contact sheet that `sfumato sample` lays beside its pictures is none of them.
    """
    files = (f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    files = (f for f in files if not (f.name == "sheet.png" and f.with_name("sample.json").exists()))
    return sorted(f for f in files if not f.stem.endswith(CONDITION))


class FolderPictures(Pictures):
    """Pictures of a folder, in name order. When all of them lie in subfolders, those are the classes."""

    def __init__(self, folder: Path, size: int):
        self.size, self.files = size, pictures_in(folder)
        if not self.files:
            raise BadInput(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        texts = _metadata(folder)
        self.captions = [texts.get(f) or _beside(f) for f in self.files]
        parts = [f.relative_to(folder).parts for f in self.files]
        if all(len(p) > 1 for p in parts):
            self.label_names = tuple(sorted({p[0] for p in parts}))
            folders = {f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")}
            if empty := sorted(folders - set(self.label_names)):
                raise BadInput(f"the class {folder / empty[0]} holds no pictures: fill it, or remove it")
        place = {name: i for i, name in enumerate(self.label_names)}
        self.labels = [place.get(p[0], 0) for p in parts]
        second = [_condition(f) for f in self.files]
        self.conditions = any(second)
        if self.conditions and not all(second):
            raise BadInput(f"{self.files[second.index(None)]} has no NAME{CONDITION}.png beside it; others do")
        self.second = second

    def __len__(self) -> int:
        return len(self.files)

    def caption(self, index: int) -> str:
        return self.captions[index]

    def label(self, index: int) -> int:
        return self.labels[index]

    def picture(self, index: int) -> np.ndarray:
        return to_square(self.files[index], self.size)

    def condition(self, index: int) -> np.ndarray:
        return to_square(self.second[index], self.size) if self.conditions else super().condition(index)


def _metadata(folder: Path) -> dict[Path, str]:
    """Captions by file, from ``metadata.jsonl``."""
    table = folder / "metadata.jsonl"
    if not table.exists():
        return {}
    try:
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {folder / row["file_name"]: row["text"] for row in rows}
    except (ValueError, LookupError, TypeError) as error:
        raise BadInput(f"{table} needs one JSON object a line, with file_name and text: {error}") from error


def _beside(file: Path) -> str:
    """The caption of a picture: a text of its name, or its name."""
    text = file.with_suffix(".txt")
    if not text.exists():
        return file.stem.replace("_", " ").replace("-", " ")
    try:
        return text.read_text(encoding="utf-8").strip()
    except ValueError as error:
        raise BadInput(f"{text} is no text in UTF-8 ({error})") from error


def _condition(file: Path) -> Path | None:
    """The picture that conditions ``file``, if there is one."""
    candidates = (file.with_name(f"{file.stem}{CONDITION}{suffix}") for suffix in sorted(SUFFIXES))
    return next((c for c in candidates if c.exists()), None)
