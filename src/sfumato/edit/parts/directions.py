"""Directions that an edit has written into its folder, to be used on other pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.foreign import read_tensors

from .geometry import fixed_signs

FILE = "tensors.safetensors"


def read_directions(
    path: Path, name: str, due: Mapping[str, str], directions: Sequence[int] | None = None, common: bool = False
) -> Float[Tensor, "direction *features"]:
    """The wanted directions in a file of an edit: the first picture's, or those that its pictures have in common.

    Args:
        path: the file, or the folder that holds it.
        name: of the tensor, (picture, direction, *features).
        due: what the file must say of the model, the time and the place.
        directions: which, counted from 0; None: all.
        common: `in_common` of all pictures.

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
    found = in_common(tensors[name]) if common else tensors[name][0]
    if directions is None:
        return found
    if max(directions) >= len(found):
        raise BadInput(f"{file} holds {len(found)} directions, counted from 0: there is no {max(directions)}")
    return found[list(directions)]


def require_shape(directions: Float[Tensor, "direction *shape"], features: Float[Tensor, "*features"]) -> None:
    """Refuse directions that are not of the shape of these features.

    Raises:
        BadInput: says which shapes, and why they differ.
    """
    if directions.shape[1:] != features.shape:
        found, here = ("x".join(map(str, shape)) for shape in (directions.shape[1:], features.shape))
        raise BadInput(f"these directions are of features of {found}, and here they are of {here}: directions go with "
                       "pictures of the size that they were found on, so find them anew for this one")  # fmt: skip


def in_common(spans: Float[Tensor, "picture direction *features"]) -> Float[Tensor, "direction *features"]:
    """The directions that lie deepest in all spans: the mean of subspaces on the Grassmann manifold, chordal distance.

    Each span is given by orthonormal rows. The mean of their projectors has as its leading eigenvectors the span that
    is nearest to all (the least sum of squared sines of principal angles), the direction that they share most first.
    The largest entry of each is positive: spans have no signs.
    """
    rows = spans.flatten(0, 1).flatten(1)
    _, _, v = torch.linalg.svd(rows.double(), full_matrices=False)
    v = v[: spans.shape[1]]
    return (fixed_signs(v) * v).to(spans).reshape(spans.shape[1:])
