"""Learned words (textual inversion): rows added to the text encoders' embeddings while a block lasts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.errors import BadInput, SfumatoError
from sfumato.files import atomic_file

from .hooks import attach
from .organs import Organs
from .text import scale_of

# What stands where: an owner, the name of its attribute, and the tokenizer or embedding table that is there.
_State = list[tuple[Any, str, Any]]


class LearnedToken:
    """A new word whose embedding is trained; a context manager, inside which prompts may use the word.

    On exit tokenizers and embedding tables are exactly what they were (the same objects); the trained rows
    stay here, and the block may be entered again. Words are left in the reverse order of entering, as
    ``with`` does by itself.

    Attributes:
        word: the word as prompts write it.
        embeddings: one parameter of shape (vectors, width) per text encoder, float32.
    """

    def __init__(self, p: Organs, word: str, rows: list[Float[Tensor, "vectors width"]]):
        self.word = word
        self.embeddings = tuple(nn.Parameter(r.detach().clone().float()) for r in rows)
        self._p = p
        self._undo: _State = []

    @property
    def embedding(self) -> Float[nn.Parameter, "vectors width"]:
        """The trainable rows of the first text encoder (the only one of SD 1.x/2.x)."""
        return self.embeddings[0]

    @property
    def vectors(self) -> int:
        return self.embedding.shape[0]

    @property
    def names(self) -> list[str]:
        """The tokens that the word stands for, named as diffusers names those of a multi-vector word."""
        return [self.word, *(f"{self.word}_{i}" for i in range(1, self.vectors))]

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser trains."""
        return list(self.embeddings)

    def __enter__(self) -> LearnedToken:
        if self._undo:
            raise SfumatoError(f"the word {self.word!r} is already active")
        pipe = self._p.pipe
        extensions: _State = []
        check_length(self._p, sum(t.vectors for t in self._p.learned) + self.vectors)
        for (tok, enc), rows in zip(self._p.text_parts(), self.embeddings, strict=True):
            tokenizer, encoder = getattr(pipe, tok), getattr(pipe, enc)
            table = encoder.get_input_embeddings()
            extended = with_words(tokenizer, self.names)
            first = extended.convert_tokens_to_ids(self.names[0])
            if first > num_words(table):
                raise SfumatoError(f"the tokenizer of {enc} has more words than its embedding table")
            replaced = _Extended(table, rows, first)
            extensions += [(pipe, tok, extended), *((owner, name, replaced) for owner, name in _places(encoder))]
        self._undo = _swap(extensions)
        self._p.learned.append(self)
        return self

    def __exit__(self, *error) -> None:
        if not self._p.learned or self._p.learned[-1] is not self:
            raise SfumatoError(f"the word {self.word!r} must be left before those that were added earlier")
        self._p.learned.pop()
        _swap(self._undo)
        self._undo = []

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the rows as a textual-inversion file that ``pipe.load_textual_inversion`` loads.

        SD: {word: rows}. SDXL: {"clip_l": rows, "clip_g": rows}, given to that function one by one with
            ``token=word``; likewise others with several text encoders, by the family's ``text_keys``.
        """
        keys = self._p.text_keys if len(self.embeddings) > 1 else (self.word,)
        tensors = {k: e.detach().cpu().contiguous() for k, e in zip(keys, self.embeddings, strict=True)}
        with atomic_file(path, overwrite) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})


def new_token(p: Organs, word: str, init_word: str, vectors: int) -> LearnedToken:
    """See `Text2Image.add_token`."""
    refuse_wordless(p)
    check_length(p, vectors)
    rows = []
    for tok, enc in p.text_parts():
        tokenizer, table = getattr(p.pipe, tok), getattr(p.pipe, enc).get_input_embeddings()
        ids = tokenizer(init_word, add_special_tokens=False).input_ids
        if not ids:
            raise BadInput("the word to start from is empty: name one that the model knows")
        refuse_known(tokenizer, word)
        with torch.no_grad():
            chosen = table.weight[torch.tensor(ids, device=table.weight.device)]  # which may be offloaded
            mean = chosen.to(p.device, torch.float32).mean(dim=0, keepdim=True)
        rows.append(mean.repeat(vectors, 1))
    return LearnedToken(p, word, rows)


def refuse_wordless(p: Organs) -> None:
    """Raise `BadInput` if a pipeline has no text encoder of its own, whose table could have more words."""
    if not p.text_parts():
        raise BadInput(f"{p.title} has no text encoder that could learn a word: tune the network itself")


def refuse_known(tokenizer: Any, word: str) -> None:
    """Raise `BadInput` if a tokenizer has this word already, or it is not one word."""
    if not word or word.split() != [word]:
        raise BadInput(f"{word!r} cannot be a learned word: give one word without spaces")
    if tokenizer.get_vocab().keys() & {word, f"{word.lower()}</w>", f"▁{word}"}:
        other = f"{word[:-1]}-2>" if word.endswith(">") else f"<{word}>"
        raise BadInput(f"{word!r} is already a word of this model: choose a new one, such as {other}")


def check_length(p: Organs, vectors: int) -> None:
    """Raise `BadInput` if so many learned tokens leave no room in a prompt."""
    room = p.context_length - 2
    if not 1 <= vectors <= room:
        raise BadInput(
            f"{vectors} learned tokens: this model's context holds 1 to {room} besides start and end"
        )


def num_words(table: nn.Module) -> int:
    """Rows of an embedding table, learned ones included."""
    return table.weight.shape[0]


@contextmanager
def without_learned(p: Organs) -> Iterator[None]:
    """The pipeline as it is without its learned words, for the duration of the block."""
    before = [_swap(token._undo) for token in reversed(p.learned)]
    try:
        yield
    finally:
        for state in reversed(before):
            _swap(state)


@contextmanager
def standing_in(p: Organs, first: str, rows: Sequence[Float[Tensor, "words width"]]) -> Iterator[None]:
    """Other embeddings for the words from ``first`` on, for the duration of the block, whatever graph they are in.

    Args:
        first: a word of the pipeline; it and those added after it get the rows, one each.
        rows: a tensor for each text encoder.
    """
    refuse_wordless(p)
    handles = []
    for (tok, enc), new in zip(p.text_parts(), rows, strict=True):
        at, encoder = getattr(p.pipe, tok).convert_tokens_to_ids(first), getattr(p.pipe, enc)
        scale = scale_of(encoder.get_input_embeddings())
        tables = {id(table): table for table in (getattr(owner, name) for owner, name in _places(encoder))}
        handles += [attach(table, partial(_stand_in, at, new, scale)) for table in tables.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stand_in(first: int, rows: Tensor, scale: Any, table: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    at = args[0] - first
    inside = (at >= 0) & (at < len(rows))
    new = F.embedding(at.clamp(0, len(rows) - 1), rows.to(output.device)).to(output.dtype) * scale
    return torch.where(inside[..., None], new, output)


def _swap(state: _State) -> _State:
    """Put tokenizers and tables in place; gives those that were there."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in state]
    for owner, name, new in state:
        setattr(owner, name, new)
    return before


def _places(encoder: Any) -> list[tuple[nn.Module, str]]:
    """Where a text encoder keeps its embedding table: T5 has it twice, sharing one weight."""
    table = encoder.get_input_embeddings()
    owners = [(owner, name, child) for owner in encoder.modules() for name, child in owner.named_children()]
    return [(o, name) for o, name, child in owners if child is table or _same_weight(child, table)]


def _same_weight(module: nn.Module, table: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.weight is table.weight


class _Extended(nn.Module):
    """An embedding table with further rows from the token ``first`` on, of which only those receive gradients.

    Tables may have spare rows (T5's has), which no token of the tokenizer uses.
    """

    def __init__(self, table: nn.Module, rows: nn.Parameter, first: int):
        super().__init__()
        self.table, self.rows, self.first = table, rows, first
        self.embed_scale = scale_of(table)

    @property
    def weight(self) -> Float[Tensor, "words width"]:
        old = self.table.weight  # which may be offloaded
        return torch.cat([old[: self.first], self.rows.to(old.device, old.dtype)])

    def forward(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        first = self.first
        old = self.table(ids.clamp(max=first - 1))
        new = F.embedding((ids - first).clamp(min=0), self.rows.to(old.device)).to(old.dtype) * scale_of(self.table)
        return torch.where((ids >= first)[..., None], new, old)


def with_words(tokenizer: Any, words: list[str]) -> Any:
    """A copy of a tokenizer that knows further words."""
    extended = copy.deepcopy(tokenizer)
    # transformers 5 gives CLIP's tokenizer a patched decode, which copying loses.
    if hasattr(extended, "_wrap_decode_method_backend_tokenizer"):
        extended._wrap_decode_method_backend_tokenizer()
    if extended.add_tokens(words) != len(words):
        raise BadInput(f"{words[0]!r} is already a word of this model: choose a new one")
    return extended
