"""Rows of one format for many tasks: an instruction, pictures that stand in it, the picture that it asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from sfumato.data import sketch
from sfumato.errors import BadInput, unknown

from .base import to_image, told_apart
from .captions import decode, lines_of
from .sketch.captions import article

PLACE = "<img><|image_{}|></img>"
"""Where picture {} stands in an instruction."""
_FIRST = PLACE.format(1)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        text: the instruction, with a place for every input picture.
        inputs: the names of the input pictures, in order.
        output: the name of the picture that is asked for.
        edit: it is the first input picture with something changed.
    """

    text: str
    inputs: tuple[Hashable, ...]
    output: Hashable
    edit: bool = False


class Instructions(Protocol):
    """Rows by index, and pictures by name; a row and a picture are always the same."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Row ``index``."""
        ...

    def picture(self, name: Any) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels of a picture, of its own size."""
        ...

    def said(self, index: int) -> str:
        """How a complaint calls row ``index``."""
        return f"row {index}"


class InstructionFile(Instructions):
    """Lines of JSON: ``{"instruction": TEXT, "input_images": [FILE, ...] or null, "output_image": FILE}``.

    Files are named from the folder in which the lines lie. ``"edit": true`` says that a row is the first input picture
    with something changed.

    Raises:
        BadInput: there is no such file; a line that is none of these, or names a picture that is not there.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file).expanduser()
        if not self.file.is_file():
            raise BadInput(f"there are no instructions at {file}: give 'sketch' or a file of JSON lines")
        lines = lines_of(decode(self.file.read_bytes(), str(self.file)))
        self._rows = [self._read(line, i) for i, line in enumerate(lines, start=1) if line.strip()]
        self._lines = [i for i, line in enumerate(lines, start=1) if line.strip()]
        if not self._rows:
            raise BadInput(f"{file} has no lines: write one row of JSON a line")

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return self._rows[index]

    def picture(self, name: Any) -> UInt8[np.ndarray, "height width 3"]:
        return np.asarray(to_image(self.file.parent / name))

    def said(self, index: int) -> str:
        return f"line {self._lines[index]} of {self.file}"

    def identity(self) -> str:
        """What tells these rows from others: how many they are, and a SHA-256 over them; no picture is looked at."""
        return told_apart(len(self), [astuple(row) for row in self._rows])

    def _read(self, line: str, number: int) -> Row:
        where = f"line {number} of {self.file}"
        try:
            told = json.loads(line)
            json.dumps(told, ensure_ascii=False).encode()  # half a character, as \\ud800 alone, is no text
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} is no JSON ({error}): write one row a line") from error
        told = told if isinstance(told, dict) else {}
        text, inputs, output = told.get("instruction"), told.get("input_images") or [], told.get("output_image")
        if not isinstance(text, str) or not isinstance(inputs, list) or not isinstance(output, str):
            raise BadInput(f"{where} needs an instruction, input_images (a list or null) and an output_image")
        for name in (*inputs, output):
            if not isinstance(name, str) or not os.path.isfile(self.file.parent / name):  # also of too long a name
                raise BadInput(f"{where} names a picture that is not there: {name!r}, from {self.file.parent}")
        edit = told.get("edit", False)
        if not isinstance(edit, bool):
            raise BadInput(f"edit in {where} is true or false, not {edit!r}")
        return Row(text, tuple(inputs), output, edit)


class SketchInstructions(Instructions):
    """Tasks of the sketch world, in turn: row i is of task i modulo their number, and of a scene of its own.

    Args:
        size: side of the pictures.
        count: rows.
        tasks: some of `TASKS`.
    """

    def __init__(self, size: int, seed: int, count: int, tasks: tuple[str, ...]):
        for task in tasks:
            if task not in TASKS:
                raise unknown("task", task, tuple(TASKS))
        self.size, self.seed, self.count, self.tasks = size, seed, count, tasks

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> sketch.Scene:
        """What row ``index`` is about: one object in three rows of four, else two."""
        rng = np.random.default_rng((self.seed, index))
        return sketch.sample_scene(rng, 1 + int(rng.random() < 0.25))

    def row(self, index: int) -> Row:
        return TASKS[self.tasks[index % len(self.tasks)]](self, index)

    def picture(self, name: Any) -> UInt8[np.ndarray, "height width 3"]:
        index, kind = name
        scene = self.scene(index)
        if kind == "layout":
            return layout(scene, self.size)
        if kind == "edited":
            scene = edited(scene, self._rng(index))
        if kind == "elsewhere":
            scene = elsewhere(scene, self._rng(index))
        drawn = sketch.render(scene, self.size)
        return edges(drawn) if kind == "edges" else drawn

    def caption(self, index: int) -> str:
        """What the scene of a row shows."""
        return sketch.caption(self.scene(index), np.random.default_rng((self.seed, index, 2)))

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index, 1))


def edges(picture: UInt8[np.ndarray, "height width 3"], threshold: int = 40) -> UInt8[np.ndarray, "height width 3"]:
    """White where a pixel differs from the one to its right or below by more than ``threshold`` in some colour."""
    x = picture.astype(int)
    down = np.abs(np.diff(x, axis=0, append=x[-1:])).max(axis=2)
    right = np.abs(np.diff(x, axis=1, append=x[:, -1:])).max(axis=2)
    return np.repeat(np.where(np.maximum(down, right) > threshold, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def layout(scene: sketch.Scene, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A box in an object's colour where each stands, on black, later objects over earlier ones."""
    picture = np.zeros((size, size, 3), np.uint8)
    for item in scene.objects:
        low, high = ([round(size * (at + side * item.scale / 2)) for at in (item.x, item.y)] for side in (-1, 1))
        picture[max(0, low[1]) : max(0, high[1]), max(0, low[0]) : max(0, high[0])] = sketch.PALETTE[item.colour]
    return picture


def edited(scene: sketch.Scene, rng: np.random.Generator) -> sketch.Scene:
    """The scene with its first object in a colour that nothing in it has."""
    taken = {item.colour for item in scene.objects}
    free = [colour for colour in sketch.COLOURS if colour not in taken]
    first, *others = scene.objects
    return replace(scene, objects=(replace(first, colour=free[rng.integers(len(free))]), *others))


def elsewhere(scene: sketch.Scene, rng: np.random.Generator) -> sketch.Scene:
    """The scene's first object in another scene, by itself and in the same style."""
    first = scene.objects[0]
    return sketch.sample_scene(rng, 1, object=first.object, colour=first.colour, style=scene.style)


def _drawing(data: SketchInstructions, i: int) -> Row:
    return Row(data.caption(i), (), (i, "picture"))


def _from_edges(data: SketchInstructions, i: int) -> Row:
    return Row(f"a picture with the edges {_FIRST}: {data.caption(i)}", ((i, "edges"),), (i, "picture"))


def _to_edges(data: SketchInstructions, i: int) -> Row:
    return Row(f"the edges of {_FIRST}", ((i, "picture"),), (i, "edges"))


def _from_layout(data: SketchInstructions, i: int) -> Row:
    return Row(f"a picture with the layout {_FIRST}: {data.caption(i)}", ((i, "layout"),), (i, "picture"))


def _to_layout(data: SketchInstructions, i: int) -> Row:
    return Row(f"the layout of {_FIRST}", ((i, "picture"),), (i, "layout"))


def _editing(data: SketchInstructions, i: int) -> Row:
    first = edited(data.scene(i), data._rng(i)).objects[0]
    return Row(f"{_FIRST} with the {first.object} in {first.colour}", ((i, "picture"),), (i, "edited"), edit=True)


def _subject(data: SketchInstructions, i: int) -> Row:
    scene = elsewhere(data.scene(i), data._rng(i))
    text = f"the {scene.objects[0].object} of {_FIRST} on {article(scene.background)} background"
    return Row(text, ((i, "picture"),), (i, "elsewhere"))


TASKS: dict[str, Callable[[SketchInstructions, int], Row]] = {
    "draw": _drawing, "edges-to-picture": _from_edges, "picture-to-edges": _to_edges,
    "layout-to-picture": _from_layout, "picture-to-layout": _to_layout, "edit": _editing, "subject": _subject,
}  # fmt: skip
"""Tasks of the sketch world: text to picture, control to picture, picture to control, editing, subject."""


def open_instructions(source: str, size: int, seed: int, count: int, tasks: tuple[str, ...]) -> Instructions:
    """Rows of the sketch world ("sketch"), or of a file of JSON lines, which has its own size, number and tasks.

    Raises:
        BadInput: as `InstructionFile`; an unknown task.
    """
    return SketchInstructions(size, seed, count, tasks) if source == "sketch" else InstructionFile(source)
