"""Text encoders: what one reads, from texts, token ids or embeddings, and the roles of what it reads."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sfumato.errors import BadInput

from .conditioning import Role


@dataclass(frozen=True)
class Read:
    """What one text encoder reads.

    Attributes:
        ids: token ids, padded.
        mask: 1 up to the first end token, 0 for padding.
        start, end: ids of the tokenizer's start and end tokens; None where it has none.
        embeddings: what stands in for the rows of the encoder's table, or None.
    """

    ids: Int[Tensor, "batch length"]
    mask: Int[Tensor, "batch length"]
    start: int | None
    end: int | None
    embeddings: Float[Tensor, "batch length width"] | None = None

    @property
    def ends(self) -> Int[Tensor, "batch"]:
        """Where the first end token stands."""
        return self.mask.sum(dim=1) - 1

    @property
    def roles(self) -> Int[Tensor, "batch length"]:
        """The `Role` of each token."""
        last = torch.arange(self.ids.shape[1], device=self.ids.device) == self.ends[:, None]
        roles = torch.full_like(self.ids, int(Role.WORD)).masked_fill(self.mask == 0, int(Role.PADDING))
        if self.start is not None:
            roles[:, 0].masked_fill_(self.ids[:, 0] == self.start, int(Role.START))
        return roles if self.end is None else roles.masked_fill(last & (self.ids == self.end), int(Role.END))


class Layout(TypedDict):
    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    roles: Int[Tensor, "batch length"]


def layout(*reads: Read) -> Layout:
    """The fields of a `Conditioning` that say what its rows are, for reads that stand one after the other."""
    return Layout(
        ids=torch.cat([r.ids for r in reads], dim=1),
        mask=torch.cat([r.mask for r in reads], dim=1).bool(),
        roles=torch.cat([r.roles for r in reads], dim=1),
    )


def tokenize(
    tokenizer: Any, prompts: Sequence[str], length: int, device: torch.device, padding: str = "max_length"
) -> Read:
    """Texts as ``length`` tokens each, words learned as several tokens written out.

    Args:
        padding: "longest" pads to the longest of them only.

    Warns:
        UserWarning: a text is longer; the warning names what is cut off.
    """
    texts = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
    for ids in tokenizer(texts).input_ids:
        if len(ids) > length:
            rest = tokenizer.decode(ids[length - 1 : -1]).strip()
            message = f"the prompt has {len(ids)} tokens, the model reads {length}; cut off: {rest!r}"
            warnings.warn(message, stacklevel=3)
    options = {"truncation": True, "padding_side": "right", "return_tensors": "pt"}
    out = tokenizer(texts, padding=padding, max_length=length, **options)
    return Read(out.input_ids.to(device), out.attention_mask.to(device), tokenizer.bos_token_id, tokenizer.eos_token_id)


def given(
    tokenizer: Any,
    table: nn.Module,
    ids: Int[Tensor, "batch length"],
    mask: Tensor | None,
    rows: Float[Tensor, "batch length width"] | None,
    closed: bool = True,
) -> Read:
    """The caller's own tokens; see `Text2Image.encode_ids`.

    Args:
        closed: whether prompts end with the end token; where they do not, what is no padding counts.
    """
    end = tokenizer.eos_token_id
    if mask is None and not closed:
        mask = (ids != tokenizer.pad_token_id).long()
    elif mask is None:
        ended = (ids == end).cumsum(dim=1)
        mask = (ended - (ids == end).long() == 0).long()
    read = Read(ids, mask.to(ids), tokenizer.bos_token_id, end)
    if rows is None:
        return read
    words, width = table.weight.shape
    if rows.shape[:2] != ids.shape or rows.shape[2] not in (words, width):
        raise BadInput(
            f"embeddings of shape {tuple(rows.shape)} for token ids of shape {tuple(ids.shape)}: give one row a token, "
            f"of {width} numbers (an embedding) or of {words} (weights of the words)"
        )
    rows = rows.to(ids.device)  # where the table is not, if it is offloaded
    return replace(read, embeddings=rows @ table.weight.to(rows) if rows.shape[2] == words else rows)


def run(encoder: nn.Module, read: Read, **options: Any) -> Any:
    """The encoder's output; embeddings that were given stand in for the rows of its table, differentiably."""
    if read.embeddings is None:
        return encoder(read.ids, **options)
    table: Any = encoder.get_input_embeddings()
    rows = read.embeddings.to(table.weight.dtype) * scale_of(table)
    if "inputs_embeds" in inspect.signature(encoder.forward).parameters:
        return encoder(inputs_embeds=rows, **options)
    hook = table.register_forward_hook(lambda module, inputs, output: rows)
    try:
        return encoder(read.ids, **options)
    finally:
        hook.remove()


def scale_of(table: nn.Module) -> Tensor | float:
    """The factor between a row of an embedding table and what it gives for that token: 1 but in Gemma's."""
    scale: Any = getattr(table, "embed_scale", 1.0)
    return scale.to(table.weight.dtype) if torch.is_tensor(scale) else scale


def pooled(last: Float[Tensor, "batch length width"], read: Read) -> Float[Tensor, "batch width"]:
    """The last layer at the first end token.

    By the mask, not by ids: checkpoints with the historical end token 2 pool at the largest id, a learned word's.
    """
    return last[torch.arange(len(last), device=last.device), read.ends]


def find(ids: Int[Tensor, "batch length"], phrase: Sequence[int]) -> Bool[Tensor, "batch length"]:
    """Where the tokens of a phrase stand in each row, one after the other; every occurrence."""
    n, length = len(phrase), ids.shape[1]
    found = torch.zeros_like(ids, dtype=torch.bool)
    if not 0 < n <= length:
        return found
    starts = (ids.unfold(1, n, 1) == ids.new_tensor(list(phrase))).all(dim=-1)
    for i in range(n):
        found[:, i : length - n + 1 + i] |= starts
    return found
