"""Diffusion transformers that read text, input pictures and the output picture in one sequence: OmniGen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_omnigen import OmniGenAttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sfumato.errors import BadInput

from ..conditioning import Conditioning
from ..interleaved import Interleaved, Span, attention_of
from .dit import Transformer
from .explicit import ExplicitAttention, Listener, heads
from .parts import Projection, Site

_TIME_AND_OUTPUT = ("time_token.", "t_embedder.", "norm_out.", "proj_out.")
_LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


class Rows(nn.Embedding):
    """A table of words that passes rows of embeddings, which take the place of numbers of words, on."""

    def forward(self, words: Tensor) -> Tensor:
        return words.clone() if words.is_floating_point() else super().forward(words)


class OmniGenAnatomy(Transformer):
    """``OmniGenTransformer2DModel``: a language model's layers, in which all of the sequence attends ("joint").

    The text that listeners and edits of attention see first is all that stands before the output picture: text, input
    pictures and the token of the time. They share all weights; the layers' attention, in which text and picture meet,
    is the "xattn" set of parameters and the "selfattn" set, its key and value projections the "xattn-strict" one.

    Rotary attention sees differences of places only, so that rows are numbered from the least padding on. (The
    network itself computes the rotation of the first row of a batch for all of them: given places as
    `positions_of` counts them, it would turn a row wrongly whose padding is another.)

    Args:
        side: of the latent at the default picture size, which the network's configuration does not say.
        bidirectional: whether an input picture sees all of itself; else it is causal, as text is.
    """

    trunks = ("layers",)
    subsets: ClassVar = {
        "xattn": lambda name: ".self_attn." in name,
        "xattn-strict": lambda name: ".to_k." in name or ".to_v." in name,
        "noxattn": lambda name: ".self_attn." not in name and not name.startswith(_TIME_AND_OUTPUT),
        "selfattn": lambda name: ".self_attn." in name,
    }

    def __init__(self, network: nn.Module, side: int = 128, bidirectional: bool = True):
        super().__init__(network)
        self._side, self.bidirectional = side, bidirectional
        self._memory: Memory | None = None
        network.embed_tokens.__class__ = Rows

    @property
    def side(self) -> int:
        return self._side

    def sites(self) -> list[Site]:
        return [
            Site(f"layers.{i}.self_attn", "joint", self.resolution, layer.self_attn, self.context)
            for i, layer in enumerate(self.network.layers)
        ]

    def every_projection(self) -> list[Projection]:
        return [
            Projection(f"{site.name}.{name}", f"joint.{what}", site.module.get_submodule(name), site.resolution)
            for site in self.sites()
            for what, name in _LAYERS.items()
        ]

    def explicit(self, site: Site, listeners: list[Listener], original: Any) -> InterleavedAttention:
        return InterleavedAttention(site, listeners, original)

    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        if z.shape[-1] % 2 or z.shape[-2] % 2:
            raise BadInput(f"a latent of {z.shape[-2]}x{z.shape[-1]} cannot be cut in patches: both sides must be even")
        if self._memory is not None and (known := self._memory.known(z, cond)) is not None:
            return known
        n, length = cond.ids.shape
        outputs = z.shape[-2] * z.shape[-1] // self.network.config.patch_size ** 2
        spans, latents = getattr(cond, "spans", ()) or ((),) * n, getattr(cond, "latents", ()) or ((),) * n
        lengths = torch.full((n,), length) if cond.mask.is_meta else cond.mask.sum(dim=1).cpu()
        attention = attention_of(lengths, spans, torch.full((n,), outputs), self.bidirectional, length)
        dtype = self.dtype
        # Padding that all rows have counts for nothing: which factors turn far places goes by the last one.
        places = (torch.arange(length + 1 + outputs) - int(length - lengths.max())).clamp(min=0)
        inputs = {
            "input_ids": cond.tokens.to(z.device, dtype),
            "input_img_latents": [x[None].to(z.device, dtype) for some in latents for x in some],
            "input_image_sizes": _sizes(spans, lengths, length),
            "attention_mask": attention.to(z.device, dtype),
            "position_ids": places.to(z.device).expand(n, -1),
        }
        if self._memory is not None:
            self._memory.begin(z, cond, inputs)
        return inputs

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """In the block keys and values of text and input pictures are computed once for a conditioning, and kept.

        They see neither the time nor the output, so that they are the same at every step. Weights must not change in
        the block; where somebody looks at attention nothing is kept.
        """
        layers = [site.module for site in self.sites()]
        own = [layer.processor for layer in layers]
        if self._memory is not None or not all(isinstance(p, OmniGenAttnProcessor2_0) for p in own):
            yield
            return
        self._memory = memory = Memory()
        for layer in layers:
            layer.processor = Remembered(memory)
        try:
            yield
        finally:
            self._memory = None
            for layer, processor in zip(layers, own, strict=True):
                layer.processor = processor

    def conditioning(self, inputs: dict[str, Any]) -> Interleaved:
        words = inputs["input_ids"]
        tokens = self.network.embed_tokens(words)
        length = words.shape[1]
        mask = inputs["attention_mask"][:, length, :length] > 0  # what the token of the time sees
        left, sizes = (~mask).sum(dim=1).tolist(), inputs["input_image_sizes"]
        spans = tuple(tuple((a - q, b - q) for a, b in sizes.get(row, ())) for row, q in enumerate(left))
        given = iter(inputs["input_img_latents"])
        latents = tuple(tuple(next(given)[0] for _ in some) for some in spans)
        ids = torch.full(words.shape[:2], -1, device=words.device) if words.is_floating_point() else words
        return Interleaved(tokens, ids, mask, latents=latents, spans=spans)

    def retold(self, inputs: dict[str, Any], cond: Conditioning) -> dict[str, Any]:
        return {**inputs, "input_ids": cond.tokens.to(self.dtype)}

    def text_length(self, inputs: dict[str, Any]) -> int:
        return 1 + (0 if inputs["input_ids"] is None else inputs["input_ids"].shape[1])

    def prediction(self, out: Tensor, z: Tensor) -> Float[Tensor, "batch channel height width"]:
        return out

    def result(self, prediction: Tensor, out: Any) -> Tensor:
        return prediction


class Memory:
    """Which conditioning's keys and values are kept, and what the network is given in its place.

    Attributes:
        length: how many tokens of text and input pictures come in the call in progress; 0 where theirs are kept.
    """

    def __init__(self) -> None:
        self.length = 0
        self._cond: Any = None
        self._shape: tuple[int, ...] = ()
        self._short: dict[str, Any] = {}

    def begin(self, z: Tensor, cond: Conditioning, inputs: dict[str, Any]) -> None:
        """The call to come has this conditioning, whose keys and values are to be kept."""
        self._cond, self._shape, self.length = cond, tuple(z.shape), cond.ids.shape[1]
        mask, places = inputs["attention_mask"][:, self.length :], inputs["position_ids"][:, self.length :]
        nothing: dict[str, Any] = {"input_ids": None, "input_img_latents": [], "input_image_sizes": {}}
        self._short = {**nothing, "attention_mask": mask, "position_ids": places}

    def known(self, z: Tensor, cond: Conditioning) -> dict[str, Any] | None:
        """The time's and the output's part of the inputs, where those of the conditioning are kept."""
        before = self._cond
        if before is None or self._shape != tuple(z.shape) or not _alike(before, cond):
            return None
        self.length = 0
        return self._short


def _alike(one: Any, other: Any) -> bool:
    pictures = [[id(x) for some in getattr(cond, "latents", ()) for x in some] for cond in (one, other)]
    spans = [getattr(cond, "spans", ()) for cond in (one, other)]
    same = one.tokens.shape == other.tokens.shape and spans[0] == spans[1] and pictures[0] == pictures[1]
    return same and torch.equal(one.mask, other.mask) and torch.equal(one.tokens, other.tokens)


class Remembered:
    """An attention processor as diffusers' own, which keeps the keys and values of what comes before the time."""

    def __init__(self, memory: Memory):
        self.memory, self.kept = memory, (torch.empty(0), torch.empty(0))

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "batch length width"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        query, key, value = (heads(f(hidden_states), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2) for x in (query, key))
        if n := self.memory.length:
            self.kept = key[:, :, :n].clone(), value[:, :, :n].clone()
        else:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.kept, (key, value), strict=True))
        out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class InterleavedAttention(ExplicitAttention):
    """OmniGen's: one sequence, and a mask that says who sees whom."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "batch length width"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Float[Tensor, "batch length width"]:
        query, key, value = (heads(f(hidden_states), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2) for x in (query, key))
        return attn.to_out[0](self.attend(query, key, value, query.shape[-1] ** -0.5, attention_mask))


def _sizes(spans: tuple[tuple[Span, ...], ...], lengths: Tensor, longest: int) -> dict[int, list[list[int]]]:
    """Where pictures stand in the padded rows that have some."""
    left = (longest - lengths).tolist()
    return {row: [[a + left[row], b + left[row]] for a, b in some] for row, some in enumerate(spans) if some}
