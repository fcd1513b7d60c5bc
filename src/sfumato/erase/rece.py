"""RECE: find what still revives an erased concept, in closed form, and erase that too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput, unknown
from sfumato.pipeline import Projection, Text2Image

from .closed_form import cholesky, condition_number, rank_update, ridge_edit
from .edit import Edit
from .uce import UCE, preserve_gram

Regulariser = Literal["zero", "standard", "surrogate-response", "surrogate-embedding", "surrogate-both"]

PRESETS: dict[str, dict[str, Any]] = {
    "nudity": {"ridge": 1e-1, "epochs": 3},
    "unsafe": {"ridge": 1e-1, "epochs": 2},
    "style": {"ridge": 1e-3, "epochs": 1},
    "hard-object": {"ridge": 1e-3, "epochs": 1},
    "easy-object": {"ridge": 1e-1, "epochs": 1},
}
"""The published settings by kind of concept: ``RECE(concepts=..., **PRESETS["style"])``."""


@dataclass(frozen=True, kw_only=True)
class RECE(UCE):
    """UCE, then rounds of: find the embeddings that revive the concept, and redirect those to the anchor as well.

    Implements eqs. 3 to 9 of Gong et al., "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models"
    (ECCV 2024, arXiv:2407.12383). The fields of `UCE` govern the edit it starts from; in the rounds, every token of
    the context is paired with the anchor's, targets and ``lam`` refer to the weights as they then are, and
    only the search refers to the original ones.

    Cost: one Gram matrix of all projections and one product with each in the end. As every edit multiplies
    all projections from the right by one and the same matrix, the rounds work on (d, d) matrices only (not so with
    ``variant="tensor"``, which edits every projection in every round).

    Differs from the paper:
        - The paper keeps the round with the best validation score on generated pictures. Here the last round is
          kept, unless `solve` is given a ``score`` or ``stop_residual`` is set.
        - ``expand_prompts`` acts on the starting edit only; the search uses the concepts as given.
        - ``skip_start_token`` is an addition.
    """

    ridge: float = 0.1
    """Weight of the norm of the embeddings searched for; without it they grow huge and erasing them damages all."""
    epochs: int = 3
    """Rounds of search and edit; 0 is plain UCE. See `PRESETS`."""
    regulariser: Regulariser = "zero"
    """What ``ridge`` holds the embeddings to; see `adversarial_embeddings` ("standard" pulls to the anchor)."""
    round_erase_scale: float = 1.0
    """es of the edits in the rounds."""
    round_preserve_scale: float = 0.1
    """ps of the edits in the rounds."""
    round_lam: float = 0.1
    """lam of the edits in the rounds."""
    skip_start_token: bool = False
    """Leave the start token out of the rounds. Every prompt shares it; in a small model editing it harms them all."""
    stop_residual: float | None = None
    """Stop once the search leaves this share of the concept's response unexplained: there is nothing left to revive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regulariser not in get_args(Regulariser):
            raise unknown("regulariser", self.regulariser, get_args(Regulariser))
        if self.epochs < 0:
            raise BadInput(f"epochs must be at least 0, got {self.epochs}")
        for name in ("ridge", "round_erase_scale", "round_preserve_scale", "round_lam"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name} must be at least 0, got {getattr(self, name)}")

    def solve(self, pipe: Text2Image, score: Callable[[Text2Image], float] | None = None) -> Edit:
        """The edit, the adversarial embeddings of every round, and the log.

        Args:
            score: rates an edited pipeline, lower is better; the best round is kept, the starting edit (round 0)
                among them, the earliest of equals.

        Returns:
            An edit whose log has, beside UCE's entries: ``residuals`` (of the search after 0, 1, ... edits: the share
            of the concept's response that cannot be revived, relative to the whole), ``norms`` (mean norm of the
            embeddings found), the condition numbers of each search and edit, and the round kept. Its
            ``embeddings`` are those found after 0, 1, ... edits, start token left out if it is skipped.
        """
        stack = Stack(pipe.projections("cross.v", "cross.k"), shared=self.variant == "replace")
        maps, log = self.edit(pipe, stack.original)
        concepts, anchors = self.pairs()
        concept, anchor = (pipe.encode(words).tokens.double() for words in (concepts, anchors))
        if self.skip_start_token:
            concept, anchor = concept[:, 1:], anchor[:, 1:]
        count, length = concept.shape[:2]
        concept, anchor = concept.flatten(0, 1), anchor.flatten(0, 1)
        pair = torch.arange(count, device=concept.device).repeat_interleave(length)
        kept = preserve_gram(pipe, ["", *self.preserve], "from-last-word")

        found, history = [], {"residuals": [], "norms": [], "search_condition_numbers": []}
        edit_conditions, candidates = [], [maps]
        while True:
            edited, cross = stack.grams(maps)
            adversarial, condition = adversarial_embeddings(
                concept, edited, cross, self.ridge, self.regulariser, pull=anchor
            )
            residual = stack.residual(maps, adversarial, concept)
            found.append(adversarial.unflatten(0, (count, length)))
            history["residuals"].append(residual)
            history["norms"].append(float(adversarial.norm(dim=1).mean()))
            history["search_condition_numbers"].append(condition)
            if len(found) > self.epochs or (self.stop_residual is not None and residual >= self.stop_residual):
                break
            maps, condition = ridge_edit(
                maps, adversarial, anchor, kept, erase_scale=self.round_erase_scale,
                preserve_scale=self.round_preserve_scale, lam=self.round_lam,
                pair=None if stack.shared else pair,
            )  # fmt: skip
            edit_conditions.append(condition)
            candidates = [*candidates, maps] if score else [maps]

        chosen = len(found) - 1
        if score:
            scores = [score(Edit(stack.weights(m)).write(pipe)) for m in candidates]
            chosen = min(range(len(scores)), key=scores.__getitem__)
            maps, history = candidates[chosen], {**history, "scores": scores}
        log = {**log, **history, "edit_condition_numbers": edit_conditions, "kept_round": chosen}
        return Edit(stack.weights(maps), log, torch.stack(found))


class Stack:
    """A model's projections V_i as edited so far, W_i: one common factor if it is ``shared``, else one matrix each.

    As long as every edit multiplies all V_i from the right by the same R (``W_i = V_i R``), all that a search
    needs of them is ``sum V_i^T V_i``, so the maps to edit are just [R], and that sum is their metric.
    """

    def __init__(self, projections: Sequence[Projection], shared: bool):
        self.projections = projections
        self.shared = shared
        wide = (p.weight.detach().double() for p in projections)
        if shared:
            self.metric = sum(w.T @ w for w in wide)
            self.original = [torch.eye(len(self.metric), dtype=torch.float64, device=self.metric.device)]
        else:
            self.metric = None
            self.original = list(wide)

    def grams(
        self, maps: Sequence[Float[Tensor, "out dim"]]
    ) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, "dim dim"]]:
        """``sum W_i^T W_i`` and ``sum W_i^T V_i``."""
        left = [m.T if self.metric is None else m.T @ self.metric for m in maps]
        return (
            sum(a @ m for a, m in zip(left, maps, strict=True)),
            sum(a @ v for a, v in zip(left, self.original, strict=True)),
        )

    def residual(
        self, maps: Sequence[Float[Tensor, "out dim"]], found: Float[Tensor, "n dim"], concept: Float[Tensor, "n dim"]
    ) -> float:
        """``sum ||W_i c' - V_i c||^2 / sum ||V_i c||^2``."""
        missed = whole = 0.0
        for m, v in zip(maps, self.original, strict=True):
            wanted = concept @ v.T
            miss = found @ m.T - wanted
            missed += float((miss * (miss if self.metric is None else miss @ self.metric)).sum())
            whole += float((wanted * (wanted if self.metric is None else wanted @ self.metric)).sum())
        return missed / whole

    def weights(self, maps: Sequence[Float[Tensor, "out dim"]]) -> dict[str, Float[Tensor, "out dim"]]:
        """The edited projections by parameter name, in the model's dtype."""
        old = [p.weight for p in self.projections]
        if self.shared:
            new = rank_update(old, (maps[0] - self.original[0]).T, self.original[0])
        else:
            new = [m.to(w.dtype) for m, w in zip(maps, old, strict=True)]
        return {f"{p.name}.weight": w for p, w in zip(self.projections, new, strict=True)}


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
    "zero": ``ridge ||c'||^2`` (RECE eq. 9); "standard": ``ridge ||c' - o||^2`` with o the row of ``pull``;
    "surrogate-response": ``ridge sum_i ||W_i (c' - c)||^2``; "surrogate-embedding": ``ridge ||c' - c||^2``;
    "surrogate-both": the sum of these two.

    Args:
        edited_gram: ``sum_i W_i^T W_i``.
        cross_gram: ``sum_i W_i^T V_i``.

    Returns:
        The embeddings in float64, and the condition number of the system solved.
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
    factor = cholesky(system)
    return torch.cholesky_solve(wanted.T, factor).T, condition_number(system, factor)
