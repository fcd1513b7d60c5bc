"""Directions that an edit has written into its folder, to be used on other pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.foreign import read_tensors

FILE = "tensors.safetensors"


def read_directions(
    path: Path, name: str, due: Mapping[str, str], directions: Sequence[int] | None = None
) -> Float[Tensor, "direction *features"]:
    """The wanted directions of the first picture in a file of an edit.

    Args:
        path: the file, or the folder that holds it.
        name: of the tensor, (picture, direction, *features).
        due: what the file must say of the model, the time and the place.
        directions: which, counted from 0; None: all.

    Raises:
        BadInput: no such file; directions of another model, time or place, or fewer of them.
    """
    file = path / FILE if path.is_dir() else path
    tensors, told = read_tensors(file, "a file of directions")
    if name not in tensors:
        raise BadInput(f"{file} holds no directions: give the folder of an edit that found some")
    for key, value in due.items():
        if told.get(key) != value:
            others = f"{key} {told.get(key, 'unknown')!r:.40}, and here it is {value!r:.40}"
            raise BadInput(f"the directions of {file} belong to {others}: find them anew for this {key}")
    found = tensors[name][0]
    if directions is None:
        return found
    if max(directions) >= len(found):
        raise BadInput(f"{file} holds {len(found)} directions, counted from 0: there is no {max(directions)}")
    return found[list(directions)]
