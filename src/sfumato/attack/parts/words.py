"""The words of a pipeline as attacks search among them: ids, mixtures of words in their places, and text again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.conditioning import Role

Row = Sequence[int]
"""The words of one prompt as token ids, without start, end and padding."""


@dataclass(frozen=True)
class Words:
    """The words of a pipeline: those of its first text encoder, which all others share where `shared_words` says so."""

    pipe: Text2Image

    @property
    def tokenizer(self) -> Any:
        return self.pipe.tokenizers[0]

    def __len__(self) -> int:
        return len(self.tokenizer)

    @cached_property
    def usable(self) -> Int[Tensor, "words"]:
        """The ids of all tokens that are words or pieces of some: not start, end or padding."""
        special = set(self.tokenizer.all_special_ids)
        return torch.tensor([i for i in range(len(self)) if i not in special])

    @cached_property
    def lead(self) -> int:
        """How many tokens stand before the words: the start token, where there is one."""
        return len(self.tokenizer("").input_ids) - 1

    @property
    def room(self) -> int:
        """How many words a prompt may have, in tokens."""
        return self.pipe.context_length - self.lead - 1

    def of(self, prompt: str) -> list[int]:
        """The words of a prompt, as the pipeline reads it."""
        cond = self.pipe.encode(prompt)
        roles: Any = cond.roles
        return cond.ids[0][roles[0] == Role.WORD].tolist()

    def read(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that were found by search, without start and end, however many."""
        return self.tokenizer(list(texts), add_special_tokens=False).input_ids

    def text(self, row: Row) -> str:
        """What one would write to say these tokens. Read again it may be others: not every row of ids is a text."""
        return self.tokenizer.decode(list(row), skip_special_tokens=True).strip()

    def ids(self, rows: Sequence[Row], padding: int | None = None) -> list[Int[Tensor, "batch length"]]:
        """What each text encoder reads: start, words, end, padding; words that are too many are cut off.

        Args:
            padding: the id of what fills the rest; None: each tokenizer's own.
        """
        made = []
        for tokenizer, length in zip(self.pipe.tokenizers, self.pipe.text_lengths(), strict=True):
            start, (end,) = tokenizer("").input_ids[:-1], tokenizer("").input_ids[-1:]
            fill = tokenizer.pad_token_id if padding is None else padding
            whole = [[*start, *list(row)[: length - len(start) - 1], end] for row in rows]
            made.append(torch.tensor([row + [fill] * (length - len(row)) for row in whole], device=self.pipe.device))
        return made

    def encode(
        self,
        rows: Sequence[Row],
        mixed: Float[Tensor, "batch k words"] | None = None,
        at: Int[Tensor, "batch k"] | None = None,
        padding: int | None = None,
    ) -> Conditioning:
        """The conditioning of words, differentiable in what is ``mixed``.

        Args:
            rows: ids; where words are mixed, whatever words are not special stand in their places.
            mixed: weights of all words (one-hot: that word itself, to the same bits), in place of
            at: these words of each row, counted from 0.
            padding: as for `ids`.
        """
        ids = self.ids(rows, padding)
        if mixed is None or at is None:
            return self.pipe.encode_ids(ids)
        return self.pipe.encode_ids(ids, embeddings=[self.put(i, x, at) for i, x in self._read(ids, mixed)], grad=True)

    def encode_many(self, rows: Sequence[Row]) -> Conditioning:
        """The same to rounding, of many words as a search tries them: where the network does not look at padding,
        which may be many times a text, it is zeros, and not computed."""
        if not self.pipe.masked:
            return self.encode(rows)
        length = self.lead + max(map(len, rows)) + 1
        return self.pipe.encode_ids([i[:, :length] for i in self.ids(rows)]).padded(self.pipe.context_length)

    def tables(self) -> list[Float[Tensor, "words width"]]:
        """The embeddings of the words, for each text encoder."""
        return [table[: len(self)].to(self.pipe.device) for table in self.pipe.word_tables]  # they may be offloaded

    def put(
        self, rows: Float[Tensor, "batch length width"], put: Float[Tensor, "batch k width"], at: Int[Tensor, "batch k"]
    ) -> Float[Tensor, "batch length width"]:
        """Embeddings with others in the places ``at`` of the words."""
        where = (at.to(rows.device) + self.lead)[..., None].expand_as(put)
        return rows.scatter(1, where, put.to(rows))

    def _read(self, ids: list[Tensor], mixed: Tensor) -> list[tuple[Tensor, Tensor]]:
        tables = self.tables()
        return [(table[i], mixed.to(table.device) @ table.to(mixed)) for i, table in zip(ids, tables, strict=True)]


def shared_words(pipe: Text2Image) -> Words:
    """The words of a pipeline whose text encoders share one vocabulary.

    Raises:
        BadInput: they do not, so that a token of one is none of another; or the prompt stands inside of a template.
    """
    first, *others = (tokenizer.get_vocab() for tokenizer in pipe.tokenizers)
    if any(vocabulary != first for vocabulary in others):
        raise BadInput(
            "this attack searches tokens, and the text encoders of this model read different vocabularies: use one "
            "that searches embeddings or texts, such as concept-inversion or paraphrase"
        )
    words = Words(pipe)
    if not words.tokenizer("").input_ids or not _as_read(words, "a"):
        raise BadInput(
            "this attack searches the tokens of a prompt, which this model's text encoder reads inside of a text of "
            "its own: use one that searches embeddings or texts, such as concept-inversion or paraphrase"
        )
    return words


def _as_read(words: Words, prompt: str) -> bool:
    """Whether a prompt's words between start and end are what the pipeline reads of it."""
    read = words.pipe.encode(prompt).ids[0]
    mine = words.ids([words.of(prompt)])[0][0]
    n = int((mine != mine[-1]).sum()) + 1
    return bool((read[: min(n, len(read))].cpu() == mine[: min(n, len(read))].cpu()).all())


def generator(seed: int, case: int) -> torch.Generator:
    """The source of all randomness in the attack on one case, whichever others are attacked beside it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + case) % 2**63)


def random_words(words: Words, n: int, rng: torch.Generator) -> list[int]:
    """``n`` tokens at random, each as likely as any other."""
    return words.usable[torch.randint(len(words.usable), (n,), generator=rng)].tolist()


def wide(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """In float32 at least: squares summed over all tokens and channels are beyond what float16 holds, and many
    candidates' distances and cosines are one number in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
