"""Unified concept editing (UCE): one ridge problem for every key and value projection of cross-attention."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.fields import NotNegative
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.anatomy import Projection

from .parts.closed_form import gram, ridge_edit
from .parts.edit import ClosedForm, Edit
from .parts.words import check_readable, encode_words, wrong_anchors

Tokens = Literal["from-last-word", "last-word"]
Variant = Literal["replace", "tensor"]
Expansion = Literal["none", "style", "object"]
Read = Literal["tokens", "pooled"]
READERS: dict[Read, str] = {"tokens": "text.in", "pooled": "pooled.in"}
"""What the maps read that are edited where there is no cross-attention: their kinds, by the field of a conditioning."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": (),
    "style": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}
ENCODE_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class UCE(ClosedForm):
    """Rewrites the cross-attention key and value projections so that a concept's tokens act as its anchor's.

    Solves eq. 7 of Gandikota et al., "Unified Concept Editing in Diffusion Models" (WACV 2024, arXiv:2308.14761)
    for every projection; `sfumato.erase.parts.closed_form` states the problem and the shared factorisation.
    Cost: encoding the prompts, one Cholesky factorisation of (d, d) in float64 (d = 768 for SD 1.x, 2048 for
    SDXL), and a product of low rank per projection; under a second for SD 1.5 on a CPU.

    On SD3 and Flux.1, which have no cross-attention, the two linear maps that read the encoders' embeddings are edited
    instead (``context_embedder`` and ``time_text_embed.text_embedder.linear_1``), each for its own rows. That reaches
    as far as the embeddings alone do. The keys and values of joint attention are made of text states that depend on the
    time and on the layers below; they stay as they are. What an encoder has mixed of the concept into the rows of words
    before the concept's last one is seen as before.

    Anchors default to " " (nothing); for styles the papers use "art". An anchor "" is taken for " ".

    Differs from the paper:
        - Token alignment and scales follow the released code, which the paper does not spell out. With
          ``tokens="from-last-word"`` (first release; RECE starts from it) the rows from each prompt's last word to
          the end of the context are paired, cut to equal length, and the empty prompt is always preserved. With
          "last-word" (later release) only the last word's token of each prompt counts.
        - ``variant="tensor"`` normalises over a prompt's whole token block, as the code does.
        - On SDXL the pooled text embedding also reaches the network, by a path that this edit does not touch.

    Raises (from `solve`):
        BadInput: a concept or anchor that the tokenizer cannot read; a singular system (``lam=0``).
    """

    needs_instead: ClassVar[tuple[str, ...]] = tuple(READERS.values())

    erase_scale: NotNegative = 1.0
    """Weight of the redirected tokens (es)."""
    preserve_scale: NotNegative | None = None
    """Weight of the preserved tokens (ps). None: as the released code, round(max(0.1, 1 / |P|), 3) where |P| counts
    the empty prompt, so 1.0 without a list; always 1.0 with ``tokens="last-word"``."""
    lam: NotNegative = 0.5
    """Weight of staying at the weights as they are."""
    tokens: Tokens = "from-last-word"
    """Which token rows are edited and preserved."""
    variant: Variant = "replace"
    """"replace": the anchor's response; "tensor": the anchor's response less its part along the concept's."""
    expand_prompts: Expansion = "none"
    """Also edit five phrases around each concept, for a style ("painting by ...") or an object ("photo of ...")."""

    def solve(self, pipe: Text2Image) -> Edit:
        return joined([self._solve(pipe, read, maps) for read, maps in edited_maps(pipe).items()])

    def _solve(self, pipe: Text2Image, read: Read, maps: Sequence[Projection]) -> Edit:
        weights, log = self.edit(pipe, [p.weight for p in maps], read)
        return Edit({f"{p.name}.weight": w for p, w in zip(maps, weights, strict=True)}, log)

    def edit(
        self, pipe: Text2Image, weights: Sequence[Float[Tensor, "out dim"]], read: Read = "tokens"
    ) -> tuple[list[Float[Tensor, "out dim"]], dict[str, Any]]:
        """The edit of any linear maps of the token (or pooled) embeddings of ``pipe``, and its log."""
        sources, targets, pair = self.rows(pipe, read)
        kept = self.preserved_prompts(pipe)
        scale = self.preserve_scale
        if scale is None:
            scale = 1.0 if self.tokens == "last-word" else round(max(0.1, 1 / len(kept)), 3)
        edited, condition = ridge_edit(
            weights, sources, targets, preserve_gram(pipe, kept, self.tokens, read),
            erase_scale=self.erase_scale, preserve_scale=scale, lam=self.lam,
            pair=pair if self.variant == "tensor" else None,
        )  # fmt: skip
        log = {"condition_number": condition, "edited_rows": len(sources), "preserved_prompts": len(kept),
               "preserve_scale": scale}  # fmt: skip
        return edited, log

    def rows(
        self, pipe: Text2Image, read: Read = "tokens"
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"], Int[Tensor, "n"]]:
        """Embeddings of the concepts, those of their anchors row for row, and the pair each row is from."""
        phrases = ("{}", *TEMPLATES[self.expand_prompts])
        concepts, anchors = self.pairs()
        check_readable(pipe, anchors)
        concept = as_read(pipe, encode_words(pipe, [p.format(c) for c in concepts for p in phrases]))
        # The first release pairs every phrase with the bare anchor, the later one with the anchor's phrase.
        around = phrases if self.tokens == "last-word" else ["{}"] * len(phrases)
        anchor = as_read(pipe, pipe.encode([p.format(a) for a in anchors for p in around]))
        if read == "pooled":
            rows = [(concept.pooled[i : i + 1], anchor.pooled[i : i + 1]) for i in range(len(concept))]
        else:
            rows = [aligned_rows(pipe, concept[i], anchor[i], self.tokens) for i in range(len(concept))]
        pair = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(c) for c, _ in rows]))
        return torch.cat([c for c, _ in rows]), torch.cat([a for _, a in rows]), pair.to(pipe.device)

    def pairs(self) -> tuple[list[str], list[str]]:
        """Concepts and the anchor of each. Warns of a concept that is its own anchor, since editing it changes nothing,
        and of one that turns into another that is erased: what that looked like is drawn for it."""
        anchors = [self.anchor_for(i, " ") or " " for i in range(len(self.concepts))]
        for told in wrong_anchors(self.concepts, anchors):
            warnings.warn(f"{told}: what it turns into is drawn", stacklevel=2)
        return list(self.concepts), anchors

    def preserved_prompts(self, pipe: Text2Image) -> list[str]:
        """What is preserved: the empty prompt counts, except with ``tokens="last-word"``."""
        return list(self.kept(pipe)) if self.tokens == "last-word" else ["", *self.kept(pipe)]


def edited_maps(pipe: Text2Image) -> dict[Read, list[Projection]]:
    """The linear maps of embeddings that a network has, by what they read: keys and values of cross-attention, or on a
    network without it the maps that read the encoders' embeddings."""
    if "cross.k" in pipe.anatomy.kinds:
        return {"tokens": pipe.projections("cross.v", "cross.k")}
    return {read: pipe.projections(kind) for read, kind in READERS.items()}


def as_read(pipe: Text2Image, cond: Conditioning) -> Conditioning:
    """A conditioning whose rows are what the edited maps read: keys and values of some networks read projected rows."""
    return cond.replace(tokens=pipe.text_rows(cond)) if "cross.k" in pipe.anatomy.kinds else cond


def joined(edits: Sequence[Edit]) -> Edit:
    """Several edits as one, whose log is the first one's, with the second one's as ``pooled``."""
    first, *others = edits
    log = {**first.log, **({"pooled": others[0].log} if others else {})}
    return replace(first, weights={k: w for edit in edits for k, w in edit.weights.items()}, log=log)


def aligned_rows(
    pipe: Text2Image, concept: Conditioning, anchor: Conditioning, tokens: Tokens
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
    """Rows of two prompts (one row each) that stand for each other; see `UCE` for the two alignments.

    Where several encoders' rows stand one after the other, those of each are aligned. Where the network does not look
    at padding, the concept's rows go as far as its end, and the anchor's last one stands for what it has fewer.
    """
    pairs = []
    for conds in zip(pipe.sections(concept), pipe.sections(anchor), strict=True):
        first = [int(pipe.last_word_token(cond)) for cond in conds]
        seen = [int(cond.mask.sum()) if pipe.masked else cond.tokens.shape[1] for cond in conds]
        count = 1 if tokens == "last-word" else seen[0] - (first[0] if pipe.masked else max(first))
        at = [[min(i + n, last - 1) for n in range(count)] for i, last in zip(first, seen, strict=True)]
        pairs.append([cond.tokens[0, rows] for cond, rows in zip(conds, at, strict=True)])
    a, b = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    return a, b


def preserve_gram(
    pipe: Text2Image, prompts: Sequence[str], tokens: Tokens, read: Read = "tokens"
) -> Float[Tensor, "dim dim"] | None:
    """``P^T P`` over the prompts' tokens (or pooled embeddings): all of the context, or their last words only.

    None without prompts.
    """
    total = None
    for start in range(0, len(prompts), ENCODE_BATCH):
        cond = as_read(pipe, pipe.encode(prompts[start : start + ENCODE_BATCH]))
        rows = cond.pooled[:, None] if read == "pooled" else cond.tokens
        if read == "tokens" and tokens == "last-word":
            index = torch.arange(len(cond), device=rows.device)
            rows = torch.stack([c.tokens[index, pipe.last_word_token(c)] for c in pipe.sections(cond)], dim=1)
        total = gram(rows) if total is None else total + gram(rows)
    return total
