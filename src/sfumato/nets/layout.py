"""Layouts as networks read them: where a node stands in its graph, and boxes as tokens.

Pure functions of arXiv:2303.04634, as its published code computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sfumato.errors import BadInput


def laplacian_positions(
    source: Int[Tensor, "edge"], target: Int[Tensor, "edge"], nodes: int, k: int, directed: bool = True
) -> Float[Tensor, "nodes k"]:
    """Eigenvectors of L = I - D^-1/2 A D^-1/2 by rising eigenvalue, all but the first, at most ``k``; zeros fill up.

    float64, of unit length, with a sign that means nothing (see `signs`).

    Args:
        source, target: of each edge; A counts the edges from source (row) to target.
        directed: the published code's. D are in-degrees (at least 1), A is as it is, and of eigenvectors that may be
            complex the real parts are taken; of graphs without circles L is defective, and what LAPACK gives depends on
            its version. False: A + A^T with its own degrees, a symmetric L; of equal eigenvalues those vectors are
            taken that Gram-Schmidt makes of the nodes in their order, the largest entry positive.
    """
    a = np.zeros((nodes, nodes))
    np.add.at(a, (source.cpu().numpy(), target.cpu().numpy()), 1.0)
    a = a if directed else a + a.T
    root = np.diag(a.sum(0).clip(1) ** -0.5)
    laplacian = np.eye(nodes) - root @ a @ root
    if directed:
        values, vectors = np.linalg.eig(laplacian)
        vectors = np.real(vectors[:, values.argsort()])
    else:
        vectors = _conventional(*np.linalg.eigh(laplacian))
    found = torch.from_numpy(np.ascontiguousarray(vectors[:, 1 : k + 1]))
    return pad(found, (0, k - found.shape[1]))


def _conventional(values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The same eigenspaces with a basis that does not depend on who computed them."""
    made: list[np.ndarray] = []
    starts = [0, *(np.flatnonzero(np.diff(values) > 1e-8) + 1), len(values)]
    for low, high in pairwise(starts):
        projector = vectors[:, low:high] @ vectors[:, low:high].T
        own: list[np.ndarray] = []
        for column in projector.T:
            if len(own) < high - low:
                rest = column - sum((v * (v @ column) for v in own), np.zeros_like(column))
                rest -= sum((v * (v @ rest) for v in own), np.zeros_like(column))  # twice is enough
                if (length := np.linalg.norm(rest)) > 1e-6:
                    own.append(rest / length)
        made += [v * np.sign(v[np.abs(v).round(9).argmax()]) for v in own]
    return np.stack(made, axis=1)


def signs(k: int, rng: torch.Generator) -> Float[Tensor, "k"]:
    """1 or -1 for each position's column: one draw for all nodes."""
    return torch.where(torch.rand(k, generator=rng) >= 0.5, 1.0, -1.0)


def place_tokens(x: Float[Tensor, "*dims"], y: Float[Tensor, "*dims"], sections: int = 90) -> Int[Tensor, "*dims"]:
    """round(y (S - 1)) S + round(x (S - 1)): the cell of a point, clamped to [0, 1], among S x S; ties go to even."""
    column, row = ((v.clamp(0, 1) * (sections - 1)).round().long() for v in (x, y))
    return row * sections + column


def places(tokens: Int[Tensor, "*dims"], sections: int = 90) -> tuple[Float[Tensor, "*dims"], Float[Tensor, "*dims"]]:
    """x and y of tokens, within 1 / (2 (S - 1)) of what `place_tokens` was given."""
    return (tokens % sections) / (sections - 1), (tokens // sections) / (sections - 1)


def layout_tokens(
    boxes: Float[Tensor, "batch object 4"],
    labels: Int[Tensor, "batch object"],
    sections: int = 90,
    slots: int = 30,
    padding: int = 8191,
    order: Int[Tensor, "object"] | None = None,
    offsets: tuple[int, int] = (0, 0),
) -> Int[Tensor, "batch length"]:
    """A layout as 3 ``slots`` + 2 tokens: of each object class, top left and bottom right; of the picture two corners.

    Args:
        boxes: left, top, right, bottom; clamped to [0, 1].
        slots: places for objects; those left empty hold ``padding``.
        order: the objects' new order; the published code draws a permutation at every call.
        offsets: added to class numbers and to places; (0, 0) is the published code's, in which a token's meaning shows
            in its position only.

    Raises:
        BadInput: more objects than slots.
    """
    if labels.shape[1] > slots:
        raise BadInput(f"{labels.shape[1]} objects, the picture itself counted, for {slots} slots: name fewer objects")
    if order is not None:
        boxes, labels = boxes[:, order], labels[:, order]
    corners = [place_tokens(boxes[..., i], boxes[..., i + 1], sections) + offsets[1] for i in (0, 2)]
    told = torch.stack([labels + offsets[0], *corners], dim=2)
    told = pad(told, (0, 0, 0, slots - labels.shape[1]), value=padding).flatten(1)
    whole = told.new_tensor([offsets[1], offsets[1] + sections**2 - 1]).expand(len(told), 2)
    return torch.cat([told, whole], dim=1)


def sorted_corners(boxes: Float[Tensor, "*dims 4"]) -> Float[Tensor, "*dims 4"]:
    """Boxes whose left is not right of their right, nor their top below their bottom."""
    one, other = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(one, other), torch.maximum(one, other)], dim=-1)


@dataclass(frozen=True)
class LayoutCode:
    """Which token means what to a transformer of layouts and picture codes.

    Attributes:
        codes: of pictures, numbered first.
        objects: classes, the picture's own among them.
        sections: cells along a side.
        slots: places for objects, the picture's own among them.
        shared: one vocabulary for classes, places and codes, the published one; else one after the other.
    """

    codes: int = 8192
    objects: int = 1
    sections: int = 90
    slots: int = 30
    shared: bool = True

    def __post_init__(self) -> None:
        if self.shared and (self.sections > isqrt(self.codes) or self.objects > self.codes):
            raise BadInput(
                f"{self.codes} codes are too few to name {self.sections} x {self.sections} places and {self.objects} "
                "classes too: give fewer sections, or separate vocabularies"
            )

    @property
    def vocabulary(self) -> int:
        """Tokens in all; the last is padding."""
        return self.codes if self.shared else self.codes + self.objects + self.sections**2 + 1

    @property
    def length(self) -> int:
        """Tokens of a layout."""
        return 3 * self.slots + 2

    def __call__(
        self,
        boxes: Float[Tensor, "batch object 4"],
        labels: Int[Tensor, "batch object"],
        order: Int[Tensor, "object"] | None = None,
    ) -> Int[Tensor, "batch length"]:
        """`layout_tokens` in this vocabulary."""
        offsets = (0, 0) if self.shared else (self.codes, self.codes + self.objects)
        return layout_tokens(boxes, labels, self.sections, self.slots, self.vocabulary - 1, order, offsets)

    def nothing(self, n: int = 1) -> Int[Tensor, "n length"]:
        """The layout of a picture of which nothing is told."""
        return self(torch.zeros(n, 0, 4), torch.zeros(n, 0, dtype=torch.long))
