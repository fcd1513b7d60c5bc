"""The text side of a pipeline: from prompts, token ids or embeddings to a `Conditioning`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfumato.errors import BadInput

from . import text
from .conditioning import Conditioning, Role
from .drawing import right_kind
from .stages import in_stage

if TYPE_CHECKING:
    from sfumato.data.base import Pictures

    from .clock import Clock

SPACE = "Ġ▁"
"""How tokenizers of language models write the space before a word."""


class Prompts(ABC):
    """What `Text2Image` does with prompts. A family names its text encoders and says how what they give is joined."""

    pipe: Any
    clock: Clock
    defaults: dict[str, Any]
    text_keys: ClassVar[tuple[str, ...]] = ()
    """What files of learned words call the text encoders, where there are several."""
    closed: ClassVar[bool] = True
    """Whether the tokenizers close a prompt with their end token; those of language models do not."""
    padding: ClassVar[str] = "max_length"
    """Up to where text encoders get prompts padded: "max_length", or the "longest" of those encoded together."""
    masked: ClassVar[bool] = False
    """Whether the network does not look at what the text encoder makes of padding."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def size(self) -> int: ...

    @abstractmethod
    def text_parts(self) -> list[tuple[str, str]]:
        """(tokenizer, text encoder) as component names, in the order in which their embeddings are joined."""

    @property
    def tokenizers(self) -> list:
        """The tokenizers, one for each text encoder, in the order of `text_parts`."""
        return [getattr(self.pipe, name) for name, _ in self.text_parts()]

    @property
    def text_encoders(self) -> list:
        """The text encoders, in the order of `text_parts`."""
        return [getattr(self.pipe, name) for _, name in self.text_parts()]

    @property
    def word_tables(self) -> list[Float[Tensor, "words width"]]:
        """The embeddings of all words, a table for each text encoder, to be read only."""
        return [encoder.get_input_embeddings().weight.detach() for encoder in self.text_encoders]

    def text_lengths(self) -> list[int]:
        """How many tokens each text encoder reads, start and end tokens included, in the order of `text_parts`."""
        parts = [(getattr(self.pipe, tok), getattr(self.pipe, enc)) for tok, enc in self.text_parts()]
        least = min(min(tok.model_max_length, enc.config.max_position_embeddings) for tok, enc in parts)
        return [least] * len(parts)

    @property
    def context_length(self) -> int:
        """How many tokens a prompt may have, start and end tokens included, before a text encoder cuts it off."""
        return min(self.text_lengths())

    def encode(
        self, prompts: str | Sequence[str], grad: bool = False, size: int | None = None
    ) -> Conditioning:
        """Encode prompts as the pipeline itself would.

        Args:
            prompts: one or several texts; "" is the empty prompt.
            grad: keep the graph (for learned tokens and attacks on the text side).
            size: side in pixels told to networks with size conditioning (SDXL); default `size`.

        Warns:
            UserWarning: a prompt is longer than what a text encoder reads; the warning names what is cut off.

        Raises:
            BadInput: no prompt; a word of `stages`.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise BadInput('no prompt was given: give at least one, "" for the empty prompt')
        if word := next((w for w in self.stages if any(w in p for p in prompts)), None):
            raise BadInput(f"{word!r} means something else in every stage of time: draw with it, or use encode_in_time")
        texts, reads = self._texts(prompts), []
        for tokenizer, length in zip(self.tokenizers, self.text_lengths(), strict=True):
            reads.append(text.tokenize(tokenizer, texts, length, self.device, self.padding))
        with torch.set_grad_enabled(grad):
            encoded = self._encode(reads, size or self.size)
        return encoded.replace(prompts=tuple(prompts))

    @property
    def stages(self) -> Mapping[str, Sequence[str]]:
        """Words that stand for others by stage of time (see `sfumato.pipeline.stages`); one of `defaults`."""
        return self.defaults.get("stages", {})

    def encode_in_time(
        self, prompts: Sequence[str], grad: bool = False, size: int | None = None
    ) -> Conditioning | Callable[[float], Conditioning]:
        """`encode`, or where a prompt has a word of `stages` what it is at each time; a stage is encoded once."""
        if not any(word in prompt for word in self.stages for prompt in prompts):
            return self.encode(prompts, grad, size)
        seen: dict[tuple[str, ...], Conditioning] = {}

        def at(t: float) -> Conditioning:
            said = tuple(in_stage(prompt, self.stages, t, self.clock.timesteps) for prompt in prompts)
            if said not in seen:
                seen[said] = self.encode(said, grad, size)
            return seen[said]

        return at

    def encode_ids(
        self,
        ids: Int[Tensor, "batch length"] | Sequence[Int[Tensor, "batch length"]],
        mask: Tensor | Sequence[Tensor] | None = None,
        embeddings: Float[Tensor, "batch length width"] | Sequence[Tensor | None] | None = None,
        grad: bool = False,
        size: int | None = None,
    ) -> Conditioning:
        """Encode token ids, or what stands in for their embeddings, as `encode` does those of a text.

        Args:
            ids: padded token ids, start and end tokens included; one tensor for all text encoders, or one each.
            mask: 1 for tokens, 0 for padding, in the same form; None: all up to the first end token, or to the padding
                where prompts are not `closed`.
            embeddings: in the same form (None for an encoder that reads ids): instead of each token's embedding
                another, or weights of all the words (one-hot rows, or mixtures), told by their width. They are
                differentiated through with ``grad``.
            grad, size: as in `encode`.

        Raises:
            BadInput: numbers of tensors or shapes that do not fit.
        """
        parts = self.text_parts()

        def each(value: Any, what: str) -> list[Any]:
            values = [value] * len(parts) if value is None or torch.is_tensor(value) else list(value)
            if len(values) != len(parts):
                raise BadInput(f"{len(values)} tensors of {what} for {len(parts)} text encoders: give one, or one each")
            return values

        fields = zip(each(ids, "token ids"), each(mask, "masks"), each(embeddings, "embeddings"), strict=True)
        with torch.set_grad_enabled(grad):
            reads = []
            for (tokenizer, encoder), row in zip(parts, fields, strict=True):
                table = getattr(self.pipe, encoder).get_input_embeddings()
                reads.append(text.given(getattr(self.pipe, tokenizer), table, *row, closed=self.closed))
            encoded = self._encode(reads, size or self.size)
        return encoded.replace(prompts=("",) * len(encoded))

    def as_seen(self, cond: Conditioning) -> Conditioning:
        """The same with zeros in the rows that the network does not look at: for whoever compares whole encodings."""
        return cond.replace(tokens=torch.where(cond.mask[..., None], cond.tokens, 0)) if self.masked else cond

    @abstractmethod
    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        """The conditioning for what each text encoder reads."""

    def _texts(self, prompts: list[str]) -> list[str]:
        """The prompts as the pipeline hands them to its tokenizers."""
        return prompts

    def _phrase(self, phrase: str) -> str:
        """A part of a prompt as it stands in what `_texts` gives."""
        return self._texts([phrase])[0]

    def last_word_token(self, cond: Conditioning) -> Tensor:
        """Index of the last word's last token in each row; of the last start token, or 0, for the empty prompt.

        Where several encoders' rows stand one after the other, it is the first one's.
        """
        if cond.roles is None:
            return cond.mask.sum(dim=1) - 2
        over = cond.roles >= Role.END
        return (torch.where(over.any(dim=1), over.long().argmax(dim=1), over.shape[1]) - 1).clamp(min=0)

    def find(self, cond: Conditioning, phrase: str) -> Bool[Tensor, "batch length"]:
        """Which rows of a conditioning's tokens stand for a phrase; every occurrence, none where it does not occur."""
        found, start = torch.zeros_like(cond.mask), 0
        for tokenizer, length in self._sections():
            section = slice(start, start + length)
            # Some tokenizers write the space before a word into its token, but at the start of a text there is none.
            said = self._phrase(phrase).strip()
            for spelled in (said, f" {said}") if said else ():
                words = tokenizer(spelled, add_special_tokens=False).input_ids
                found[:, section] |= text.find(cond.ids[:, section], words) & cond.mask[:, section]
            start += length
        return found

    def _sections(self) -> list[tuple[Any, int]]:
        """The tokenizers whose tokens are the rows of a conditioning, one after the other, and how many each."""
        return [(self.tokenizers[0], self.text_lengths()[0])]

    def sections(self, cond: Conditioning) -> list[Conditioning]:
        """A conditioning cut up by tokenizer, where several encoders' rows stand one after the other (SD3)."""
        starts = [0, *accumulate(length for _, length in self._sections())]
        return [cond.part(slice(*ends)) for ends in pairwise(starts)]

    def word_pieces(self, cond: Conditioning) -> list[list[set[str]]]:
        """By tokenizer, as `sections`: the distinct tokens of each row's words, without special ones and what frames
        them.

        Tokens of different tokenizers mean different words. Language models' tokens have the space before a word in
        them, but for a text's first: without it they are the same. Embeddings that came from elsewhere have none.
        """
        found = []
        for (tokenizer, _), part in zip(self._sections(), self.sections(cond), strict=True):
            known = torch.zeros_like(part.mask) if part.roles is None else part.roles == Role.WORD
            special = set(tokenizer.all_special_ids)
            ids = [sorted(set(all_[row].tolist()) - special) for all_, row in zip(part.ids, known, strict=True)]
            words = [tokenizer.convert_ids_to_tokens(one) for one in ids]
            found.append([set(row) if self.closed else {token.lstrip(SPACE) for token in row} for row in words])
        return found

    def told(self, asked: str | Sequence[str] | Conditioning | None, size: int | None = None) -> Conditioning:
        """`encode` for prompts, a conditioning as it is, None as `unconditional`; ``size`` as for these."""
        if asked is None:
            return self.unconditional(size=size)
        told = right_kind(asked, Conditioning, "prompts")
        return self.encode(cast("str | Sequence[str]", asked), size=size) if told is None else told

    def asked_for(self, pictures: Pictures, rows: Sequence[int]) -> list[str]:
        """The captions of these pictures."""
        return [pictures.caption(i) for i in rows]

    def unconditional(
        self, n: int = 1, negative: str | Conditioning | None = None, size: int | None = None
    ) -> Conditioning:
        """What guidance steers away from: ``negative``, or what the pipeline takes when none is given."""
        cond = negative if isinstance(negative, Conditioning) else self.encode(negative or "", size=size)
        return cond.repeat(n) if len(cond) == 1 else cond
