"""The rows that a pipeline's text encoders give undesired words, as orthonormal bases for `decor`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.conditioning import Role

from .retelling import sections
from .subspaces import basis

Vectors = list[list[Tensor]]
"""For each tokenizer's rows, for each block of their width, an orthonormal basis (dim, rank)."""


def blocks(x: Float[Tensor, "length dim"], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The rows cut along their width as bases are."""
    return x.split([len(v) for v in vectors], dim=-1)


class Bases:
    """What undesired words span in the text encoders of a pipeline, as these are now, adapters included.

    Args:
        rank: axes of a basis; None is all.
        also: rows other than words that count.
        behind: encode the words behind each prompt, and not alone.
        pooled: have a basis of their pooled embeddings, too.
        per_encoder: a basis for each of the encoders whose rows stand side by side.

    Raises:
        BadInput: a word that the context cuts off; a family without pooled embeddings, or without such encoders.
    """

    def __init__(
        self, p: Text2Image, words: Sequence[str], *, rank: int | None = None, also: Collection[Role] = (),
        behind: bool = False, pooled: bool = False, per_encoder: bool = False,
    ):  # fmt: skip
        self.p, self.words, self.rank, self.also, self.behind = p, list(words), rank, set(also), behind
        with torch.no_grad():
            alone = p.encode(self.words)
        self.widths = self._widths(alone.tokens.shape[-1]) if per_encoder else [alone.tokens.shape[-1]]
        self._alone = self._made(alone)
        if pooled and alone.pooled is None:
            raise BadInput("this family has no pooled embedding: leave pooled out")
        self.pooled = basis(alone.pooled, rank) if pooled and alone.pooled is not None else alone.tokens.new_zeros(0, 0)
        self._behind: dict[str, Vectors] = {}

    @property
    def ranks(self) -> list[int]:
        """How many axes each basis has, of the words alone."""
        return [v.shape[1] for section in self._alone for v in section]

    def of(self, cond: Conditioning, i: int) -> Vectors:
        """The bases for row ``i`` of a conditioning."""
        if not self.behind:
            return self._alone
        text = cond.prompts[i] if cond.prompts else ""
        if not text:
            if cond.roles is not None and not bool((cond.roles[i] == Role.WORD).any()):
                return self._alone  # behind no words
            raise BadInput("the text behind these embeddings is not known: draw from a prompt, or encode words alone")
        if text not in self._behind:
            with torch.no_grad():
                behind = self.p.encode([f"{text} {word}" for word in self.words])
                self._behind[text] = self._made(behind, self.p.encode(text))
        return self._behind[text]

    def _made(self, cond: Conditioning, own: Conditioning | None = None) -> Vectors:
        """The bases of the words' rows, behind those of the prompt that is ``own``, which may have the same words."""
        chosen, later = torch.zeros_like(cond.mask), torch.ones_like(cond.mask)
        if own is not None and cond.roles is not None and own.roles is not None:
            for s, first in zip(sections(self.p, cond), sections(self.p, own), strict=True):
                number = (cond.roles[:, s] == Role.WORD).cumsum(dim=1)
                later[:, s] = number > (own.roles[0, first] == Role.WORD).sum()
        for i, word in enumerate(self.words):
            chosen[i] = self.p.find(cond[i], word)[0] & later[i]
            if not chosen[i].any():
                where = f" behind {cond.prompts[i].removesuffix(word).strip()!r}" if self.behind else ""
                raise BadInput(
                    f"{word!r} is cut off{where}: the model reads {self.p.context_length} tokens of a prompt; "
                    + ("shorten the prompt, or encode the words alone" if where else "name something shorter")
                )
        for role in self.also:
            chosen |= cond.roles == role
        bases = []
        for s in sections(self.p, cond):
            rows = cond.tokens[:, s][chosen[:, s]]
            bases.append([basis(x, self.rank) for x in rows.split(self.widths, dim=-1)])
        return bases

    def _widths(self, dim: int) -> list[int]:
        """The widths of the text encoders whose rows stand side by side."""
        encoders = self.p.text_encoders
        widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders]
        if len(widths) < 2 or sum(widths) != dim:
            raise BadInput("the rows of this family are not those of encoders side by side: leave per_encoder out")
        return widths
