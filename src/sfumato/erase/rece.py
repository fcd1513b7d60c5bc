"""RECE: find what still revives an erased concept, in closed form, and erase that too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.fields import Natural, NotNegative
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.anatomy import Projection
from sfumato.pipeline.conditioning import Role

from .parts.edit import Edit
from .parts.revival import Regulariser, Stack, rounds
from .uce import UCE, Read, as_read, edited_maps, joined, preserve_gram

ILL_CONDITIONED = 1e10
"""Condition number from which on a search in float64 is good to fewer than about six digits."""


@dataclass(frozen=True, kw_only=True)
class RECE(UCE):
    """UCE, then rounds of: find the embeddings that revive the concept, and redirect those to the anchor as well.

    Implements Gong et al., "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models" (ECCV 2024,
    arXiv:2407.12383): its edit (eq. 3, that of UCE) and its closed-form search (`adversarial_embeddings`), as in the
    released code. The fields of `UCE` govern the edit it starts from; in the rounds, every token of the context is
    paired with the anchor's (on PixArt and Sana every one that the network looks at), targets and ``lam`` refer to the
    weights as they then are, and only the search refers to the original ones.

    On SD3 and Flux.1 it works on the two maps that read the encoders' embeddings, each by itself; `UCE` says how far
    that reaches. What revives a concept inside joint attention is not searched for.

    Cost: one Gram matrix of all projections and one product with each in the end. As every edit multiplies
    all projections from the right by one and the same matrix, the rounds work on (d, d) matrices only (not so with
    ``variant="tensor"``, which edits every projection in every round).

    Differs from the paper:
        - The paper keeps the round with the best validation score on generated pictures. Here the last round is
          kept, unless `solve` is given a ``score`` or ``stop_residual`` is set.
        - ``expand_prompts`` acts on the starting edit only; the search uses the concepts as given.
        - The empty prompt is preserved once in the rounds, as for objects and styles; the script for unsafe words
          counts it once per concept: ``round_preserve_scale=0.1 * K`` for K of them.
        - ``skip_start_token`` is an addition.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {"ridge": (1e-1, 1e-2, 1e-3, 1e-4), "epochs": (1, 2, 3)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "nudity": {"ridge": 1e-1, "epochs": 3},
        "unsafe": {"ridge": 1e-1, "epochs": 2},
        "style": {"ridge": 1e-3, "epochs": 1},
        "hard-object": {"ridge": 1e-3, "epochs": 1},
        "easy-object": {"ridge": 1e-1, "epochs": 1},
        "sketch": {"ridge": 1e-3, "epochs": 1},
    }
    """The published settings by kind of concept: ``RECE(concepts=..., **RECE.presets["style"])``. "sketch" is for the
    embedded model, chosen on 'star': a large ridge finds short embeddings there, whose edit undoes much of UCE's."""

    ridge: NotNegative = 0.1
    """Weight of the norm of the embeddings searched for; without it they grow huge and erasing them damages all."""
    epochs: Natural = 3
    """Rounds of search and edit; 0 is plain UCE. See `presets`."""
    regulariser: Regulariser = "zero"
    """What ``ridge`` holds the embeddings to; see `adversarial_embeddings` ("standard" pulls to the anchor)."""
    round_erase_scale: NotNegative = 1.0
    """es of the edits in the rounds."""
    round_preserve_scale: NotNegative = 0.1
    """ps of the edits in the rounds."""
    round_lam: NotNegative = 0.1
    """lam of the edits in the rounds."""
    skip_start_token: bool = False
    """Leave the start token, which all prompts share, out of the rounds: in a small model it can dominate them. T5's
    texts (PixArt) have none."""
    stop_residual: NotNegative | None = None
    """Stop once the search leaves this share of the concept's response unexplained: there is nothing left to revive."""

    def solve(self, pipe: Text2Image, score: Callable[[Text2Image], float] | None = None) -> Edit:
        """The edit, the adversarial embeddings of every round, and the log.

        Args:
            score: rates an edited pipeline, lower is better; the best round is kept, the starting edit (round 0)
                among them, the earliest of equals.

        Returns:
            An edit whose log has, beside UCE's entries: ``residuals`` (of the search after 0, 1, ... edits: the share
            of the concept's response that cannot be revived, relative to the whole), ``norms`` (mean norm of the
            embeddings found), the condition numbers of each search and edit, and the round kept; None where the
            search after the last edit has no solution. Its ``embeddings`` are those found after 0, 1, ... edits,
            start token left out if it is skipped.
        """
        edits: list[Edit] = []
        for read, maps in edited_maps(pipe).items():
            edits.append(self._revived(pipe, read, maps, score, edits))
        return joined(edits)

    def _revived(
        self,
        pipe: Text2Image,
        read: Read,
        projections: Sequence[Projection],
        score: Callable[[Text2Image], float] | None,
        before: Sequence[Edit],
    ) -> Edit:
        """`solve` for the maps that read the same embeddings; ``before`` is what was edited of the others."""
        names = [f"{p.name}.weight" for p in projections]
        stack = Stack([p.weight.detach() for p in projections], shared=self.variant == "replace")
        start, log = self.edit(pipe, stack.original, read)
        conds = [as_read(pipe, pipe.encode(words)) for words in self.pairs()]
        started = read == "tokens" and all(bool((c.roles[:, 0] == Role.START).all()) for c in conds)
        first = 1 if self.skip_start_token and started else 0
        if read == "pooled":
            concept, anchor = (c.pooled[:, None] for c in conds)
        else:
            concept, anchor = paired_rows(pipe, conds[0], conds[1], first)
        kept = preserve_gram(pipe, ["", *self.kept(pipe)], "from-last-word", read)

        def finish(maps: list[Tensor]) -> Edit:
            return joined([Edit(dict(zip(names, stack.weights(maps), strict=True))), *before])

        done: list[Any] = []
        scores: list[Any] = []
        for state in rounds(
            stack, start, concept, anchor, kept, epochs=self.epochs, ridge=self.ridge, regulariser=self.regulariser,
            erase_scale=self.round_erase_scale, preserve_scale=self.round_preserve_scale, lam=self.round_lam,
        ):  # fmt: skip
            if score:
                scores.append(score(finish(state.maps).write(pipe)))
            if not done or not score or scores[-1] < min(scores[:-1]):
                kept_round, maps = len(done), state.maps
            done.append(state._replace(maps=[]))
            if self.stop_residual is not None and state.residual >= self.stop_residual:
                break
        finite = lambda x: x if math.isfinite(x) else None
        worst = max(s.search_condition for s in done)
        if worst > ILL_CONDITIONED:
            warnings.warn(
                f"the search for embeddings is ill-conditioned ({worst:.0e}): the edited weights have grown out of "
                f"proportion; raise ridge ({self.ridge:g}) or lower epochs ({self.epochs})",
                stacklevel=2,
            )
        log = {
            **log,
            "kept_round": kept_round,
            "residuals": [finite(s.residual) for s in done],
            "norms": [finite(float(s.embeddings.norm(dim=-1).mean())) for s in done],
            "search_condition_numbers": [finite(s.search_condition) for s in done],
            "edit_condition_numbers": [s.edit_condition for s in done[1:]],
            **({"scores": scores} if score else {}),
        }
        return replace(finish(maps), log=log, embeddings=torch.stack([s.embeddings for s in done]))


def paired_rows(
    pipe: Text2Image, concept: Conditioning, anchor: Conditioning, first: int = 0
) -> tuple[Float[Tensor, "concept length dim"], Float[Tensor, "concept length dim"]]:
    """The rows of concepts from the ``first`` on, and one of each one's anchor for every row.

    Where the network does not look at padding, a concept's rows go as far as its end, and its anchor's last one stands
    for what that has fewer, as in UCE; behind the end, up to that of the longest, both are zeros and count for nothing.
    """
    if not pipe.masked:
        return concept.tokens[:, first:], anchor.tokens[:, first:]
    at = torch.arange(first, int(concept.mask.sum(dim=1).max()), device=pipe.device)
    last = anchor.mask.sum(dim=1, keepdim=True) - 1
    of = torch.arange(len(anchor), device=pipe.device)[:, None]
    rows = anchor.tokens[of, torch.minimum(at, last)]
    return concept.tokens[:, at], torch.where(concept.mask[:, at, None], rows, 0)
