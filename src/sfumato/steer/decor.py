"""DECOR: text embeddings decomposed, and projected away from undesired words (arXiv:2412.09169)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Natural, NotNegative
from sfumato.pipeline import Conditioning, Model, Text2Image
from sfumato.pipeline.conditioning import Role
from sfumato.pipeline.steering import Place

from .base import Analysis, Patch
from .parts.retelling import Retelling, sections
from .parts.subspaces import Decomposition, basis, cosines, decompose, decor
from .parts.undesired import Bases, Vectors, blocks

__all__ = ["DECOR", "Decomposition", "basis", "cosines", "decompose", "decor"]

_GROUPS = {"start": (Role.START,), "words": (Role.WORD,), "padding": (Role.END, Role.PADDING)}
"""The rows of an encoded prompt in the paper's terms: what follows the words is X_PAD."""


@dataclass(frozen=True, kw_only=True)
class DECOR(Patch):
    """Projects what the conditional half of guidance is told away from undesired words (arXiv:2412.09169).

    X' = X - alpha X P, where P projects onto the rows that the pipeline's own text encoders give the undesired words
    (`decor`). Nothing is trained, and adapters are not touched: where a LoRA of the text encoder acts, from whatever
    tool, the words are encoded under it. alpha trades what the text asks for against what the adapter's pictures
    looked like.

    ``analyse`` is the paper's decomposition of prompts: the singular values of X, the share of each axis's energy in
    the start token, the words and what follows them, and how much of each word lies in the span of the undesired ones.
    What an axis carries is seen by drawing from `Decomposition.keep`.

    Works on every family; where several encoders' rows stand one after the other (SD3), each has a projector of its
    own. It acts in sampling runs only.

    Cost: one encoding of the words (of prompt and words with ``context`` "same_prefix"), one decomposition of their
    rows, and a product with r vectors; no further call of the network.

    Raises:
        BadInput: no undesired word; one that the context cuts off; embeddings of unknown text where their words or
            rows are needed; a pooled embedding, or encoders side by side, that the family does not have.

    Reconstructed: the formula is confirmed by summaries of the paper only. Which rows are projected, that the start
    token is left alone and in no projector, that padding and pooled embeddings are none of the undesired rows, and
    alpha's default are choices of ours, each an option.

    Differs from the paper: row lengths may be restored (``keep_norm``).
    """

    NEUTRAL: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}
    """Nothing is taken away."""
    EXAMPLE: ClassVar[Mapping[str, Any]] = {"undesired": ("red",)}

    place: ClassVar[Place] = "conditioning"

    undesired: tuple[str, ...] = ()
    """Words or phrases to project away from. Name content, not "a photo of ...": all that they span goes."""
    alpha: NotNegative = 0.5
    """How much of the projection is taken away, up to 1; 0 is nothing."""
    reflect: bool = False
    """Allow alpha above 1, which turns what is undesired into its opposite."""
    rank: Natural = 0
    """Axes of the undesired rows, the strongest first; 0 is all whose singular value counts."""
    rows: Literal["all", "words", "pad"] = "all"
    """Rows of the prompt that are projected: all but the start token, its words, or what follows them."""
    context: Literal["alone", "same_prefix"] = "alone"
    """Encode an undesired word alone, or behind the prompt, which removes more."""
    include_pad: bool = False
    """Count what follows the undesired words (end token, padding) as undesired, too."""
    project_start: bool = False
    """Project the start token's row as well, and count that of the undesired words."""
    pooled: bool = False
    """Project the pooled embedding away from those of the undesired words."""
    per_encoder: bool = False
    """SDXL: project each encoder's half of the rows on its own."""
    keep_norm: bool = False
    """Give the projected rows the length that they had (not in the paper)."""

    def __post_init__(self) -> None:
        words = (self.undesired,) if isinstance(self.undesired, str) else tuple(self.undesired)
        object.__setattr__(self, "undesired", words)
        super().__post_init__()
        if any(not word.strip() for word in words):
            raise BadInput("an undesired word is empty: name what is not wanted")
        if self.alpha > 1 and not self.reflect:
            raise BadInput(f"alpha = {self.alpha:g} reflects what is undesired: choose at most 1, or say reflect")

    @contextmanager
    def acting(self, p: Text2Image) -> Iterator[dict[str, Any]]:
        told: dict[str, Any] = {}
        if not self.alpha:
            yield told
            return
        bases = self._bases(p)
        told["axes"] = bases.ranks
        with p.intercept(Retelling(lambda cond: self._projected(p, cond, bases, told)), self.place):
            yield told

    def _bases(self, p: Text2Image) -> Bases:
        if not self.undesired:
            raise BadInput("name the words to project away from, as in `--undesired square`")
        also = {Role.END, Role.PADDING} if self.include_pad else set()
        also |= {Role.START} if self.project_start else set()
        return Bases(
            p, self.undesired, rank=self.rank or None, also=also, behind=self.context == "same_prefix",
            pooled=self.pooled, per_encoder=self.per_encoder,
        )  # fmt: skip

    def _projected(self, p: Text2Image, cond: Conditioning, bases: Bases, told: dict[str, Any]) -> Conditioning:
        away = lambda x, v, rows=None: decor(
            x, v, self.alpha, rows=rows, reflect=self.reflect, keep_norm=self.keep_norm, orthonormal=True
        )
        chosen, tokens = self._rows(cond), []
        for i in range(len(cond)):
            found, row = bases.of(cond, i), cond.tokens[i].clone()
            for s, vectors in zip(sections(p, cond), found, strict=True):
                parts = zip(blocks(row[s], vectors), vectors, strict=True)
                row[s] = torch.cat([away(x, v, chosen[i, s]) for x, v in parts], dim=-1)
            tokens.append(row)
            told.setdefault("cosines", {}).update(self._near(p, cond, i, found))
        projected = torch.stack(tokens)
        before, left = (float(x[chosen].float().square().sum()) for x in (cond.tokens, projected))
        told["energy taken away"] = round(1 - left / before, 4) if before else 0.0  # a prompt may have no words
        pooled = cond.pooled
        if self.pooled and pooled is not None:
            pooled = away(pooled, bases.pooled)
        return cond.replace(tokens=projected, pooled=pooled)

    @staticmethod
    def _near(p: Text2Image, cond: Conditioning, i: int, found: Vectors) -> dict[str, float]:
        """For each word of a prompt the cosine between its rows and the span of the undesired ones, the largest."""
        near: dict[str, float] = {}
        for word in cond.prompts[i].split() if cond.prompts else ():
            where = p.find(cond[i], word)[0]
            for s, vectors in zip(sections(p, cond), found, strict=True):
                rows = cond.tokens[i, s][where[s]]
                for x, v in zip(blocks(rows, vectors), vectors, strict=True):
                    near[word] = round(max([near.get(word, 0.0), *cosines(x, v).tolist()]), 3)
        return near

    def _rows(self, cond: Conditioning) -> Bool[Tensor, "batch length"]:
        """The rows that are projected."""
        if cond.roles is None:
            raise BadInput("which rows of these embeddings are words is not known: draw from a prompt")
        chosen = cond.roles != Role.START
        if self.rows == "words":
            chosen = cond.roles == Role.WORD
        elif self.rows == "pad":
            chosen = cond.roles >= Role.END
        return chosen | (cond.roles == Role.START) if self.project_start else chosen

    @torch.no_grad()
    def analyse(
        self, model: Model, asked: Sequence[Any] | None, seeds: Sequence[int] = (0,), sampling_steps: int = 0
    ) -> Analysis:
        """The decomposition of prompts, without drawing anything.

        Tables: ``axes``, by prompt and encoder the singular values and the shares of their energy; ``rows``, the axis
        on which each word loads most; ``cosines``, if there are undesired words, between each word and their span.
        """
        if not asked or not isinstance(model, Text2Image):
            raise BadInput('give a prompt whose embeddings are to be decomposed, as in `--analyse "a red star"`')
        axes, rows, near, panels = [], [], [], {}
        bases = self._bases(model) if self.undesired else None
        for prompt in dict.fromkeys(asked):
            cond = model.encode(prompt)
            words = {word: model.find(cond, word)[0] for word in dict.fromkeys(prompt.split())}
            for number, s in enumerate(sections(model, cond)):
                x, roles = cond.tokens[0, s], cond.roles[0, s]
                groups = {name: torch.isin(roles, roles.new_tensor(kinds)) for name, kinds in _GROUPS.items()}
                made, of = decompose(x, groups), {"prompt": prompt, "encoder": number}
                shares = {name: (load / made.values.square()).nan_to_num() for name, load in made.loads.items()}
                for i, (value, energy) in enumerate(zip(made.values.tolist(), made.energy.tolist(), strict=True)):
                    each = {name: float(share[i]) for name, share in shares.items()}
                    axes.append({**of, "axis": i, "singular value": value, "energy": energy, **each})
                numbers = list(range(len(made.values)))
                panels[f"{prompt} ({number})"] = {name: (numbers, share.tolist()) for name, share in shares.items()}
                for word, where in words.items():
                    if where[s].any():
                        load = (x[where[s]].float() @ made.axes.float()).square().sum(dim=0)
                        top = int(load.argmax())
                        rows.append({**of, "word": word, "axis": top, "share": float(load[top] / load.sum())})
            if bases is not None:
                found = self._near(model, cond, 0, bases.of(cond, 0))
                near += [{"prompt": prompt, "word": word, "cosine": cosine} for word, cosine in found.items()]
        notes = ["Energy is a singular value's square over the sum of all; shares of an axis add up to 1."]
        if near:
            notes.append("A word whose cosine is near 1 goes with the undesired ones: choose others, or less alpha.")
        tables = {"axes": axes, "rows": rows, **({"cosines": near} if near else {})}
        return Analysis(axis="axis", panels=panels, tables=tables, notes=notes)
