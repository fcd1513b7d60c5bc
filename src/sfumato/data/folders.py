"""Pictures in a folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from sfumato.errors import BadInput

from .base import Pictures, to_square
from .captions import Captions
from .walk import SUFFIXES, hidden, walk

CONDITION = ".cond"
"""Ends the stem of a picture that conditions another one: NAME.cond.png goes with NAME.jpg."""


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder and its subfolders in name order, without those that condition others."""
    return _pictures_in(folder)[0]


def _pictures_in(folder: Path) -> tuple[list[Path], dict[Path, Path], Counter[str]]:
    """Its pictures; those that condition others, by the path of these without a suffix; what was left out, by reason.

    The contact sheet that `sfumato sample` lays beside its pictures is none of them.
    """
    files, left = walk(folder)
    files = [f for f in files if not (f.name == "sheet.png" and f.with_name("sample.json").exists())]
    seconds: dict[Path, Path] = {}
    for file in files:
        if file.stem.lower().endswith(CONDITION):
            seconds.setdefault(file.with_name(file.stem[: -len(CONDITION)]), file)
    return [f for f in files if not f.stem.lower().endswith(CONDITION)], seconds, left


class FolderPictures(Pictures):
    """Pictures of a folder, in name order. When all of them lie in subfolders, those are the classes."""

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        self.size, (self.files, seconds, left) = size, _pictures_in(folder)
        if not self.files:
            told = "".join(f"; left out: {n} {reason}" for reason, n in left.items())
            raise BadInput(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}){told}")
        captions = Captions(folder, self.files)
        self.captions, self.written = captions.texts, captions.written
        self.origin = str(captions)
        self.left_out = dict(left)
        if captions.strangers:
            self.left_out["captions that name no picture"] = captions.strangers
        parts = [f.relative_to(folder).parts for f in self.files]
        if all(len(p) > 1 for p in parts):
            self.label_names = tuple(sorted({p[0] for p in parts}))
            folders = {f.name for f in folder.iterdir() if f.is_dir() and not hidden((f.name,))}
            if empty := sorted(folders - set(self.label_names)):
                raise BadInput(f"the class {folder / empty[0]} holds no pictures: fill it, or remove it")
        place = {name: i for i, name in enumerate(self.label_names)}
        self.labels = [place.get(p[0], 0) for p in parts]
        second = [seconds.get(f.with_name(f.stem)) for f in self.files]
        self.conditions = any(second)
        if self.conditions and not all(second):
            raise BadInput(f"{self.files[second.index(None)]} has no NAME{CONDITION}.png beside it; others do")
        self.second = second

    def __len__(self) -> int:
        return len(self.files)

    def caption(self, index: int) -> str:
        return self.captions[index]

    def name(self, index: int) -> str:
        return str(self.files[index].relative_to(self.folder).with_suffix(""))

    def label(self, index: int) -> int:
        return self.labels[index]

    def picture(self, index: int) -> np.ndarray:
        return to_square(self.files[index], self.size)

    def condition(self, index: int) -> np.ndarray:
        return to_square(self.second[index], self.size) if self.conditions else super().condition(index)
