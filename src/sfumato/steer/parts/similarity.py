"""Correction by similarities: a concept rewritten from its nearest rows (algorithm 1 of arXiv:2310.07419)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Mode = Literal["relative", "quantile", "cosine"]
Order = Literal["normalise_first", "threshold_first"]


def similarities(
    f: Float[Tensor, "length dim"], c: int, threshold: float, mode: Mode = "relative", order: Order = "normalise_first"
) -> Float[Tensor, "length #dim"] | None:
    """Phi(f_c * f, tau), steps 1 and 2 of algorithm 1: how much each row shares with row ``c``; None if nothing passes.

    With S = f_c * f, element by element, and max(S) over all rows:

    - "relative": S / max(S) where that is above ``threshold``; in the order "threshold_first" where S itself is;
    - "quantile": S / max(S) where S is above its quantile at 1 - exp(-10 threshold), of all elements;
    - "cosine": one number a row, the cosine between f_c and f_i where it is above ``threshold``.
    """
    if mode == "cosine":
        weights = torch.cosine_similarity(f[c], f, dim=-1)[:, None]
        weights = torch.where(weights > threshold, weights, 0)
    else:
        product = f[c] * f
        top, bound = product.max(), threshold
        if not top > 0:
            return None
        if mode == "quantile":
            share = min(max(1 - math.exp(-10 * threshold), 1e-16), 1 / (1 + 1e-10))
            bound = torch.quantile(product.flatten(), share)
        relative = product / top
        compared = relative if mode == "relative" and order == "normalise_first" else product
        weights = torch.where(compared > bound, relative, 0)
    return weights if bool(weights.any()) else None


def cbs(
    f: Float[Tensor, "*batch length dim"],
    concepts: Sequence[int] | Bool[Tensor, "*batch length"],
    strength: float = 0.5,
    window: int = 2,
    threshold: float = 0.3,
    *,
    mode: Mode = "relative",
    order: Order = "normalise_first",
    words: Bool[Tensor, "*batch length"] | None = None,
    rescale: bool = False,
) -> Float[Tensor, "*batch length dim"]:
    """Correction by similarities, algorithm 1 of arXiv:2310.07419: f'_c = (1 - a) f_c + a sum_i Psi_i S~_i * f_i.

    S~ is what `similarities` gives, Psi the window of rows at most ``window`` away from c. Every concept reads the
    original rows; all other rows are kept bit for bit, and so is a concept with which nothing in its window passes the
    threshold. Half precision is computed in float32.

    Args:
        concepts: rows by number, the same in all of a batch; or which rows they are.
        strength: alpha, in [0, 1].
        words: rows that may lie in the window; all if not given.
        rescale: give the sum the length of f_c (not in the paper).
    """
    if not torch.is_tensor(concepts):
        concepts = torch.zeros(f.shape[-2], dtype=torch.bool, device=f.device).index_fill(
            0, torch.tensor(list(concepts), dtype=torch.long, device=f.device), True
        )
    if f.ndim > 2:
        rows = lambda mask: [None] * len(f) if mask is None else mask.expand(f.shape[:-1])
        options: dict[str, Any] = {"mode": mode, "order": order, "rescale": rescale}
        each = zip(f, rows(concepts), rows(words), strict=True)
        return torch.stack([cbs(x, c, strength, window, threshold, words=w, **options) for x, c, w in each])
    if strength == 0:
        return f
    x = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
    corrected, positions = f.clone(), torch.arange(len(f), device=f.device)
    for c in concepts.nonzero().flatten().tolist():
        weights = similarities(x, c, threshold, mode, order)
        near = (positions - c).abs() <= window
        near = near if words is None else near & words
        if weights is None or not bool(weights[near].any()):
            continue
        shared = (weights[near] * x[near]).sum(dim=0)
        if rescale and bool(shared.any()):
            shared = shared * (x[c].norm() / shared.norm())
        corrected[c] = ((1 - strength) * x[c] + strength * shared).to(f.dtype)
    return corrected
