"""Kinds of `Condition`: encoded text, class numbers, given frames, pictures that were seen."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from .contract import Condition


class Role(IntEnum):
    """What a row of token embeddings stands for."""

    START = 0
    WORD = 1
    END = 2
    PADDING = 3


@dataclass(frozen=True)
class Conditioning(Condition):
    """A batch of encoded prompts: sliceable, joinable, editable. Methods that work on embeddings change only this.

    Attributes:
        tokens: per-token embeddings, the input of cross-attention, or of joint attention. Where several encoders' rows
            stand one after the other (SD3), ids, mask and roles are theirs in the same order.
        ids: token ids of the (first) text encoder, start and end tokens and padding included.
        mask: True for the start token, the words and the first end token; False for padding.
        pooled: pooled text embedding (SDXL, SD3, Flux), or None.
        size_ids: SDXL's micro-conditioning (original height, width, crop top, left, target height, width), or None.
        guidance: the guidance scale that the network itself is told (Flux.1 dev), or None.
        roles: the `Role` of each row of ``tokens``; None for embeddings that came from elsewhere.
        prompts: the texts that were encoded ("" for embeddings that came from elsewhere).
        conditional: in the two halves of guidance, which rows are the conditional half; None outside guidance.
    """

    tokens: Float[Tensor, "batch length dim"]
    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    pooled: Float[Tensor, "batch pooled"] | None = None
    size_ids: Float[Tensor, "batch six"] | None = None
    guidance: Float[Tensor, "batch"] | None = None
    roles: Int[Tensor, "batch length"] | None = None
    prompts: tuple[str, ...] = ()
    conditional: Bool[Tensor, "batch"] | None = None

    def part(self, where: slice | list[int]) -> Self:
        """The same with these rows of tokens only, such as one encoder's of several that stand one after the other."""
        roles = None if self.roles is None else self.roles[:, where]
        rows = {"tokens": self.tokens[:, where], "ids": self.ids[:, where], "mask": self.mask[:, where]}
        return self.replace(**rows, roles=roles)

    def padded(self, length: int) -> Self:
        """The same with rows of padding, which are zeros, up to ``length`` tokens."""
        more = length - self.ids.shape[1]
        if more <= 0:
            return self
        rows = {"tokens": pad(self.tokens, (0, 0, 0, more)), "ids": pad(self.ids, (0, more))}
        roles = None if self.roles is None else pad(self.roles, (0, more), value=int(Role.PADDING))
        return self.replace(**rows, mask=pad(self.mask, (0, more)), roles=roles)

    def as_half(self, conditional: bool) -> Conditioning:
        """These rows as one half of guidance, so that what looks inside the network can tell the halves apart."""
        return self.replace(conditional=torch.full(self.ids.shape[:1], conditional, device=self.ids.device))


@dataclass(frozen=True)
class Labels(Condition):
    """A batch of class numbers.

    Attributes:
        numbers: from 0; the number of classes itself stands for "no class".
    """

    numbers: Int[Tensor, "batch"]


@dataclass(frozen=True)
class Frames(Condition):
    """A batch of given frames, after which others come.

    Attributes:
        frames: in the scale of the data; the last ones are used.
    """

    frames: Float[Tensor, "batch frame channel height width"]


@dataclass(frozen=True)
class Seen(Condition):
    """A batch of pictures as a frozen encoder sees them.

    Attributes:
        whole: one vector of all of a picture.
        tokens: vectors of its places, where the model looks at those too, else None.
        given: False where there is no picture; what the other fields hold there is not looked at.
    """

    whole: Float[Tensor, "batch dim"]
    given: Bool[Tensor, "batch"]
    tokens: Float[Tensor, "batch token width"] | None = None
