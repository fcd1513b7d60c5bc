"""The search for what revives an erased concept, in closed form: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .closed_form import cholesky, condition_number, rank_update, ridge_edit

Regulariser = Literal["zero", "standard", "surrogate-response", "surrogate-embedding", "surrogate-both"]


class Stack:
    """A model's projections V_i while they are edited into W_i: one common factor if ``shared``, else one map each.

    As long as every edit multiplies all V_i from the right by the same R (``W_i = V_i R``), all that a search
    needs of them is ``sum V_i^T V_i``: the maps to edit are just [R], and that sum is the metric of their responses.
    Edits that differ between projections (the "tensor" variant) take ``shared=False``, and the maps are the W_i.

    Attributes:
        original: the maps before any edit, in float64.
    """

    def __init__(self, weights: Sequence[Float[Tensor, "out dim"]], shared: bool = True):
        self._weights = weights
        if shared:
            self._metric = sum(w.double().T @ w.double() for w in weights)
            self.original = [torch.eye(len(self._metric), dtype=torch.float64, device=self._metric.device)]
        else:
            self._metric = None
            self.original = [w.double() for w in weights]

    @property
    def shared(self) -> bool:
        return self._metric is not None

    def grams(
        self, maps: Sequence[Float[Tensor, "out dim"]]
    ) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, "dim dim"]]:
        """``sum W_i^T W_i`` and ``sum W_i^T V_i``."""
        left = [m.T @ self._metric if self.shared else m.T for m in maps]
        return (
            sum(a @ m for a, m in zip(left, maps, strict=True)),
            sum(a @ v for a, v in zip(left, self.original, strict=True)),
        )

    def square(self, responses: Sequence[Float[Tensor, "n out"]]) -> float:
        """Sum of the squared responses of all projections, given those of the maps."""
        return float(sum((r * (r @ self._metric if self.shared else r)).sum() for r in responses))

    def weights(self, maps: Sequence[Float[Tensor, "out dim"]]) -> list[Float[Tensor, "out dim"]]:
        """The W_i, in the dtypes that the V_i came in."""
        if not self.shared:
            return [m.to(w.dtype) for m, w in zip(maps, self._weights, strict=True)]
        eye = self.original[0]
        return rank_update(self._weights, (maps[0] - eye).T, eye)


class Round(NamedTuple):
    """The state after some edits, and what a search finds in it.

    Attributes:
        maps: the edited maps of the `Stack`.
        embeddings: those that revive the concepts best, (concept, length, dim) in float64.
        residual: ``sum ||W_i c' - V_i c||^2 / sum ||V_i c||^2``: 0, all comes back; 1, nothing does.
        search_condition, edit_condition: condition numbers of the search here and of the edit that led here (None
            for the state at the start).
    """

    maps: list[Tensor]
    embeddings: Float[Tensor, "concept length dim"]
    residual: float
    search_condition: float
    edit_condition: float | None


def rounds(
    stack: Stack,
    maps: Sequence[Float[Tensor, "out dim"]],
    concept: Float[Tensor, "concept length dim"],
    anchor: Float[Tensor, "concept length dim"],
    preserve_gram: Float[Tensor, "dim dim"] | None,
    *,
    epochs: int = 3,
    ridge: float = 0.1,
    regulariser: Regulariser = "zero",
    erase_scale: float = 1.0,
    preserve_scale: float = 0.1,
    lam: float = 0.1,
) -> Iterator[Round]:
    """Search and edit in turn, as RECE does: the state at the start and after each of ``epochs`` edits.

    Each edit redirects the embeddings just found to the anchor's, row for row; its targets, what it preserves and
    its ``lam`` refer to the maps as they are, and only the search looks back at the original ones. The search after
    the last edit only tells how well that went: where it has no solution, its figures are not numbers.

    Args:
        stack: the projections; those of one that is not shared are edited by the "tensor" variant.
        maps: where to start: ``stack.original`` edited by UCE.
    """
    flat, goal = concept.flatten(0, 1).double(), anchor.flatten(0, 1).double()
    pair = torch.arange(len(concept), device=concept.device).repeat_interleave(concept.shape[1])
    wanted = [flat @ v.T for v in stack.original]
    edit_condition = None
    for epoch in range(epochs + 1):
        edited, cross = stack.grams(maps)
        try:
            found, search_condition = adversarial_embeddings(flat, edited, cross, ridge, regulariser, pull=goal)
        except BadInput:
            if epoch < epochs or not epochs:
                raise
            found, search_condition = torch.full_like(flat, torch.nan), torch.inf
        missed = stack.square([found @ m.T - r for m, r in zip(maps, wanted, strict=True)])
        residual = missed / stack.square(wanted)
        yield Round(list(maps), found.reshape(concept.shape), residual, search_condition, edit_condition)
        if epoch < epochs:
            maps, edit_condition = ridge_edit(
                maps, found, goal, preserve_gram, erase_scale=erase_scale, preserve_scale=preserve_scale, lam=lam,
                pair=None if stack.shared else pair,
            )  # fmt: skip


def adversarial_embeddings(
    embeddings: Float[Tensor, "n dim"],
    edited_gram: Float[Tensor, "dim dim"],
    cross_gram: Float[Tensor, "dim dim"],
    ridge: float = 0.1,
    regulariser: Regulariser = "zero",
    pull: Float[Tensor, "n dim"] | None = None,
) -> tuple[Float[Tensor, "n dim"], float]:
    """Embeddings to which the edited projections W_i respond as the original ones, V_i, did to ``embeddings``.

    Minimises ``sum_i ||W_i c' - V_i c||^2 + R`` for every row, with ``R`` one of
    "zero": ``ridge ||c'||^2`` (the paper's); "standard": ``ridge ||c' - o||^2`` with o the row of ``pull``;
    "surrogate-response": ``ridge sum_i ||W_i (c' - c)||^2``; "surrogate-embedding": ``ridge ||c' - c||^2``;
    "surrogate-both": the sum of these two.

    Args:
        edited_gram: ``sum_i W_i^T W_i``.
        cross_gram: ``sum_i W_i^T V_i``.

    Returns:
        The embeddings in float64, and the condition number of the system solved.

    Raises:
        BadInput: nothing determines the embeddings: no ``ridge``, or no term in it that holds their norm, with
            projections that are not of full rank together.
    """
    embeddings = embeddings.double()
    response = ridge if regulariser in ("surrogate-response", "surrogate-both") else 0.0
    norm = ridge if regulariser != "surrogate-response" else 0.0
    eye = torch.eye(len(edited_gram), dtype=torch.float64, device=edited_gram.device)
    system = norm * eye + (1 + response) * edited_gram
    wanted = embeddings @ cross_gram.T + response * (embeddings @ edited_gram)
    if regulariser == "standard":
        if pull is None:
            raise BadInput("the regulariser 'standard' needs embeddings to pull towards")
        wanted = wanted + norm * pull.double()
    elif regulariser in ("surrogate-embedding", "surrogate-both"):
        wanted = wanted + norm * embeddings
    factor = cholesky(system, "raise ridge, or choose another regulariser than 'surrogate-response'")
    return torch.cholesky_solve(wanted.T, factor).T, condition_number(system, factor)
