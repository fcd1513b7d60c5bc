r"""The algebra of closed-form erasing: pure functions of tensors, for one linear map or for a hundred.

Everything is stated for rows. ``C`` (n, d) are the token embeddings to be redirected, ``G`` (n, d) what each of them
is to be taken for, ``P`` (p, d) those to be left alone, and ``W`` (o, d) a projection, so that a token's response is
``W c``. The ridge problem

    min_W'  es * sum ||W' c - W g||^2  +  ps * sum ||W' p - W p||^2  +  lam * ||W' - W||_F^2

has the solution ``W' = W (lam I + es G^T C + ps P^T P) B^{-1}`` with ``B = lam I + es C^T C + ps P^T P``. The matrix
to the right of ``W`` is the same for every projection, and it is the identity plus ``(G - C)^T F`` with
``F = es C B^{-1}``. So `B` is factorised once, and each projection is edited by ``W' = W + (W (G - C)^T) F``, whose
rank is at most n. No edit (``G = C`` or ``es = 0``) leaves ``W`` as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.errors import BadInput


def ridge_edit(
    weights: Sequence[Float[Tensor, "out dim"]],
    sources: Float[Tensor, "n dim"],
    targets: Float[Tensor, "n dim"],
    preserve_gram: Float[Tensor, "dim dim"] | None = None,
    *,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lam: float = 0.5,
    pair: Int[Tensor, "n"] | None = None,
) -> tuple[list[Float[Tensor, "out dim"]], float]:
    """Redirect ``sources`` to ``targets`` in every projection, by one ridge problem each with a shared text side.

    Args:
        weights: the projections, of any output widths and any floating dtype.
        preserve_gram: ``P^T P`` of the embeddings to be left alone (see `gram`); None for none.
        erase_scale, preserve_scale, lam: es, ps and lam above, each at least 0.
        pair: which prompt pair each row belongs to; given, the target responses lose their component along the old
            response of their pair (see `orthogonal_targets`), which makes the targets differ between projections.

    Returns:
        The edited weights in the dtypes given, and the condition number (2-norm) of B.

    Raises:
        BadInput: B is singular, which takes ``lam = 0`` (or nearly) and fewer independent rows than dimensions.

    Cost: a Cholesky factorisation of (dim, dim), and min(4 n, 2 dim) * sum(out) * dim operations.
    """
    sources, targets = sources.double(), targets.double()
    system = lam * torch.eye(sources.shape[1], dtype=torch.float64, device=sources.device)
    system += erase_scale * gram(sources)
    if preserve_gram is not None:
        system += preserve_scale * preserve_gram
    factor = cholesky(system, "raise lam")
    right = erase_scale * torch.cholesky_solve(sources.T, factor).T
    if pair is None:
        edited = rank_update(weights, targets - sources, right)
    else:
        bent = (orthogonal_targets(w, sources, targets, pair) for w in weights)
        edited = [rank_update([w], g - sources, right)[0] for w, g in zip(weights, bent, strict=True)]
    return edited, condition_number(system, factor)


def gram(rows: Float[Tensor, "... n dim"]) -> Float[Tensor, "dim dim"]:
    """The float64 sum of the outer products of all rows."""
    rows = rows.reshape(-1, rows.shape[-1]).double()
    return rows.T @ rows


def cholesky(system: Float[Tensor, "dim dim"], advice: str) -> Float[Tensor, "dim dim"]:
    """Lower Cholesky factor.

    Raises:
        BadInput: the matrix is not positive definite to rounding; the message ends with ``advice``.
    """
    factor, failed = torch.linalg.cholesky_ex(system)
    # Rounding may leave a singular matrix with small pivots instead of none, by the order of the processor's sums.
    least = len(system) * torch.finfo(system.dtype).eps * system.diagonal().max()
    if failed or factor.diagonal().min() ** 2 <= least:
        raise BadInput(f"the normal equations are singular: {advice}")
    return factor


def condition_number(system: Float[Tensor, "dim dim"], factor: Float[Tensor, "dim dim"], steps: int = 40) -> float:
    """Ratio of the largest to the smallest eigenvalue, by power iteration on the matrix and on its inverse.

    Never above the true value, and within a few per cent of it unless neighbouring eigenvalues nearly coincide, when
    it matters least; a full set of eigenvalues would cost more than the edit itself.
    """
    generator = torch.Generator().manual_seed(0)
    largest = smallest = torch.randn(len(system), 1, generator=generator, dtype=system.dtype).to(system.device)
    for _ in range(steps):
        largest = system @ (largest / largest.norm())
        smallest = torch.cholesky_solve(smallest / smallest.norm(), factor)
    return float(largest.norm() * smallest.norm())


def rank_update(
    weights: Sequence[Float[Tensor, "out dim"]], left: Float[Tensor, "n dim"], right: Float[Tensor, "n dim"]
) -> list[Float[Tensor, "out dim"]]:
    """``W + (W left^T) right`` for every W, in the cheaper order; added up in float32 or better, in the dtype given.

    ``left`` and ``right`` are float64. The product with a float32 weight is done in float32: it has no inverse in
    it, so it loses no more than storing the result does.
    """
    n, dim = left.shape
    out = sum(w.shape[0] for w in weights)
    whole = 2 * n * out > dim * (n + out)
    middle = left.T @ right if whole else None
    edited = []
    for w in weights:
        dtype = torch.promote_types(w.dtype, torch.float32)
        wide = w.detach().to(dtype)
        a, b = (wide, middle) if middle is not None else (wide @ left.T.to(w.device, dtype), right)
        edited.append(torch.addmm(wide, a, b.to(w.device, dtype)).to(w.dtype))
    return edited


def orthogonal_targets(
    weight: Float[Tensor, "out dim"],
    sources: Float[Tensor, "n dim"],
    targets: Float[Tensor, "n dim"],
    pair: Int[Tensor, "n"],
) -> Float[Tensor, "n dim"]:
    """Targets ``g - a c`` whose responses have no component along the old response: the "tensor" variant.

    With ``U = W C_k / ||W C_k||_F`` over the rows of pair k, the published code replaces ``W g`` by
    ``W g - <U, W G_k>_F U``: one coefficient for the whole token block, not one for each token. As
    ``U`` is a multiple of ``W C_k``, this is a replacement by ``g - a_k c`` with
    ``a_k = <W C_k, W G_k>_F / ||W C_k||_F^2``. A block without any response has no direction and is left as it is.
    """
    weight = weight.detach().to(sources.device, sources.dtype)
    old, new = sources @ weight.T, targets @ weight.T
    blocks = int(pair.max()) + 1
    product = old.new_zeros(blocks).index_add_(0, pair, (old * new).sum(1))
    square = old.new_zeros(blocks).index_add_(0, pair, old.square().sum(1))
    coefficient = torch.where(square > 0, product / square.where(square > 0, torch.ones_like(square)), 0.0)
    return targets - coefficient[pair, None] * sources
