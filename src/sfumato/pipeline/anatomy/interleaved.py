"""Diffusion transformers that read text, input pictures and the output picture in one sequence: OmniGen."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Float
from torch import Tensor, nn

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
    pictures and the token of the time. What acts on the text alone is the table of words, which is the "xattn" set of
    parameters therefore; "selfattn" are the layers' attention.

    Rotary attention sees differences of places only, so that every row is numbered from its padding on. (The
    network itself computes the rotation of the first row of a batch for all of them: given places as
    `positions_of` counts them, it would turn a row wrongly whose padding is another.)

    Args:
        side: of the latent at the default picture size, which the network's configuration does not say.
        bidirectional: whether an input picture sees all of itself; else it is causal, as text is.
    """

    trunks = ("layers",)
    subsets: ClassVar = {
        "xattn": lambda name: name.startswith("embed_tokens."),
        "xattn-strict": lambda name: name.startswith("embed_tokens."),
        "noxattn": lambda name: not name.startswith(("embed_tokens.", *_TIME_AND_OUTPUT)),
        "selfattn": lambda name: ".self_attn." in name,
    }

    def __init__(self, network: nn.Module, side: int = 128, bidirectional: bool = True):
        super().__init__(network)
        self._side, self.bidirectional = side, bidirectional
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
        n, length = cond.ids.shape
        outputs = z.shape[-2] * z.shape[-1] // self.network.config.patch_size ** 2
        spans, latents = getattr(cond, "spans", ()) or ((),) * n, getattr(cond, "latents", ()) or ((),) * n
        lengths = torch.full((n,), length) if cond.mask.is_meta else cond.mask.sum(dim=1).cpu()
        attention = attention_of(lengths, spans, torch.full((n,), outputs), self.bidirectional)
        dtype = self.network.dtype
        return {
            "input_ids": cond.tokens.to(z.device, dtype),
            "input_img_latents": [x[None].to(z.device, dtype) for some in latents for x in some],
            "input_image_sizes": _sizes(spans, lengths, length),
            "attention_mask": attention.to(z.device, dtype),
            "position_ids": torch.arange(length + 1 + outputs, device=z.device).expand(n, -1),
        }

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
        return {**inputs, "input_ids": cond.tokens.to(self.network.dtype)}

    def text_length(self, inputs: dict[str, Any]) -> int:
        return inputs["input_ids"].shape[1] + 1

    def prediction(self, out: Tensor, z: Tensor) -> Float[Tensor, "batch channel height width"]:
        return out

    def result(self, prediction: Tensor, out: Any) -> Tensor:
        return prediction


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
