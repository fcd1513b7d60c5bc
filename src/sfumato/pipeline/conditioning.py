"""What a text-to-image denoiser is told besides the noisy latent and the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Role(IntEnum):
    """What a row of token embeddings stands for."""

    START = 0
    WORD = 1
    END = 2
    PADDING = 3


_TENSORS = ("tokens", "ids", "mask", "pooled", "size_ids", "guidance", "roles", "conditional")


@dataclass(frozen=True)
class Conditioning:
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

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: slice | int | list[int] | Tensor) -> Conditioning:
        """Rows ``index`` (an int keeps the batch dimension)."""
        rows = torch.arange(len(self))[index if not isinstance(index, int) else [index]]
        picked = self.map(lambda x: x[rows.to(x.device)])
        return replace(picked, prompts=tuple(self.prompts[int(i)] for i in rows))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same conditioning with ``fn`` applied to every tensor."""
        values = {n: getattr(self, n) for n in _TENSORS}
        return replace(self, **{n: fn(x) for n, x in values.items() if x is not None})

    def replace(self, **changes) -> Conditioning:
        """A copy with some fields replaced, e.g. ``cond.replace(tokens=edited)``."""
        return replace(self, **changes)

    def repeat(self, n: int) -> Conditioning:
        """Every row ``n`` times, rows of one prompt adjacent."""
        repeated = self.map(lambda x: x.repeat_interleave(n, dim=0))
        return replace(repeated, prompts=tuple(p for p in self.prompts for _ in range(n)))

    def as_half(self, conditional: bool) -> Conditioning:
        """These rows as one half of guidance, so that what looks inside the network can tell the halves apart."""
        return self.replace(conditional=torch.full(self.ids.shape[:1], conditional, device=self.ids.device))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in order; the parts must have the same optional fields."""
        first = parts[0]

        def join(name: str) -> Tensor | None:
            return None if getattr(first, name) is None else torch.cat([getattr(p, name) for p in parts])

        return replace(first, **{n: join(n) for n in _TENSORS}, prompts=tuple(q for p in parts for q in p.prompts))
