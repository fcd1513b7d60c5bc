"""Rows of embeddings as a matrix: its axes, the span of some rows, and what is left without it (arXiv:2412.09169)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.errors import BadInput


def _exact(x: Tensor) -> Tensor:
    """In float32 at least: a decomposition in half precision has axes that are not orthogonal."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True)
class Decomposition:
    """X = U S V^T, its axes the columns of V.

    Attributes:
        rows: X.
        values: the singular values, largest first.
        axes: V.
        loads: for each group of rows |X_rows v_i|^2 by axis; over groups that are all rows they add up to s_i^2.
    """

    rows: Float[Tensor, "length dim"]
    values: Float[Tensor, "axis"]
    axes: Float[Tensor, "dim axis"]
    loads: Mapping[str, Float[Tensor, "axis"]]

    @property
    def energy(self) -> Float[Tensor, "axis"]:
        """s_i^2 over the sum of all."""
        squares = self.values.square()
        return squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)

    def keep(self, axes: Sequence[int]) -> Float[Tensor, "length dim"]:
        """X V_I V_I^T: X on these axes alone; all of them give X."""
        chosen = self.axes[:, list(axes)]
        return (_exact(self.rows) @ chosen @ chosen.mT).to(self.rows.dtype)


def decompose(
    x: Float[Tensor, "length dim"], groups: Mapping[str, Bool[Tensor, "length"]] | None = None
) -> Decomposition:
    """The thin singular value decomposition of an encoded prompt, and which groups of its rows load on which axis."""
    exact = _exact(x)
    _, values, vh = torch.linalg.svd(exact, full_matrices=False)
    loads = {name: (exact[mask] @ vh.mT).square().sum(dim=0) for name, mask in (groups or {}).items()}
    return Decomposition(x, values, vh.mT, loads)


def basis(
    undesired: Float[Tensor, "k dim"], rank: int | None = None, tol: float = 1e-5
) -> Float[Tensor, "dim rank"]:
    """Orthonormal vectors that span the rows: the right singular ones with s_i > tol s_1, or the ``rank`` strongest."""
    _, values, vh = torch.linalg.svd(_exact(undesired), full_matrices=False)
    count = int((values > tol * values[:1]).sum())
    count = count if rank is None else min(rank, count)
    return torch.linalg.qr(vh[:count].mT).Q


def cosines(x: Float[Tensor, "*batch dim"], vectors: Float[Tensor, "dim rank"]) -> Float[Tensor, "*batch"]:
    """The cosine of the angle between each row and the span of orthonormal vectors; 0 for a row of zeros."""
    exact = _exact(x)
    length = exact.norm(dim=-1).clamp(min=torch.finfo(exact.dtype).tiny)
    return (exact @ vectors.to(exact)).norm(dim=-1) / length


def decor(
    x: Float[Tensor, "*batch length dim"],
    undesired: Float[Tensor, "k dim"],
    alpha: float = 0.5,
    rank: int | None = None,
    *,
    rows: Bool[Tensor, "*batch length"] | None = None,
    tol: float = 1e-5,
    reflect: bool = False,
    keep_norm: bool = False,
    orthonormal: bool = False,
) -> Float[Tensor, "*batch length dim"]:
    """X' = X - alpha X P with P = V V^T, the projector onto the span of the undesired rows (arXiv:2412.09169).

    With alpha = 1 what is left is orthogonal to them; with 0 it is X, bit for bit. Half precision is computed in
    float32. P is never formed.

    Args:
        undesired: embeddings of what is not wanted.
        rank, tol: as for `basis`.
        rows: which rows are projected; all if not given.
        reflect: allow alpha outside [0, 1].
        keep_norm: give every row the length that it had (not in the paper).
        orthonormal: ``undesired`` is what `basis` gives, V.

    Raises:
        BadInput: alpha outside [0, 1] without ``reflect``.
    """
    if not 0 <= alpha <= 1 and not reflect:
        raise BadInput(f"alpha must lie between 0 and 1, got {alpha:g}: say reflect to go beyond")
    if alpha == 0:
        return x
    exact = _exact(x)
    vectors = (undesired if orthonormal else basis(undesired, rank, tol)).to(exact)
    left = exact - alpha * ((exact @ vectors) @ vectors.mT)
    if keep_norm:
        tiny = torch.finfo(exact.dtype).tiny
        left = left * (exact.norm(dim=-1, keepdim=True) / left.norm(dim=-1, keepdim=True).clamp(min=tiny))
    left = left.to(x.dtype)
    return left if rows is None else torch.where(rows[..., None], left, x)
