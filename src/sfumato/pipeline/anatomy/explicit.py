"""Attention in the open: processors that compute it step by step, for whoever listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from .parts import Site

Stage = Literal["kv", "logits", "probs"]
STAGES = ("kv", "logits", "probs")


@dataclass(frozen=True, eq=False)
class Listener:
    """Who looks at attention: at which stage and sites, and what takes the place of what is there."""

    stage: Stage
    wanted: Callable[[Site], bool]
    function: Callable[..., Any]


class ExplicitAttention:
    """A diffusers attention processor that computes softmax(q k^T / sqrt(d)) v in the open, for listeners.

    Without listeners it equals diffusers' own processors up to rounding. Projections are called as modules,
    so adapters on them act as ever.
    """

    def __init__(self, site: Site, listeners: list[Listener], original: Any):
        self.site, self.listeners, self.original = site, listeners, original

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "batch query width"],
        encoder_hidden_states: Float[Tensor, "batch key width2"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs,
    ) -> Float[Tensor, "batch query width"]:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key = normed(attn, heads(attn.to_q(hidden_states), attn.heads), heads(attn.to_k(context), attn.heads))
        value = heads(attn.to_v(context), attn.heads)
        out = self.attend(query, key, value, attn.scale, self._mask(attn, attention_mask, query, key))
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def attend(
        self,
        query: Float[Tensor, "batch head query width"],
        key: Float[Tensor, "batch head key width"],
        value: Float[Tensor, "batch head key width"],
        scale: float,
        mask: Float[Tensor, "batch head #query key"] | None = None,
    ) -> Float[Tensor, "batch query width2"]:
        """softmax(scale q k^T + mask) v with the heads joined, as the listeners will have it."""
        key, value = self._apply("kv", key, value)
        logits = query @ key.transpose(-1, -2) * scale
        if mask is not None:
            logits = logits + F.pad(mask, (0, key.shape[-2] - mask.shape[-1]))  # keys that a listener appended count
        (logits,) = self._apply("logits", logits)
        # In half precision softmax loses the small probabilities; diffusers' fused kernels sum in float32,
        # too.
        probs = (
            logits.float().softmax(dim=-1)
            if logits.dtype in (torch.float16, torch.bfloat16)
            else logits.softmax(-1)
        )
        (probs,) = self._apply("probs", probs)
        return (probs.to(value.dtype) @ value).transpose(1, 2).flatten(2)

    def _mask(self, attn: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        if mask is None:
            return None
        mask = attn.prepare_attention_mask(mask, key.shape[-2], len(query))
        return mask.view(len(query), attn.heads, -1, mask.shape[-1])

    def _apply(self, stage: Stage, *tensors: Tensor) -> tuple[Tensor, ...]:
        for listener in self.listeners:
            if listener.stage == stage:
                result = listener.function(self.site, *tensors)
                tensors = result if isinstance(result, tuple) else (result,)
        return tensors


class SanaAttention(ExplicitAttention):
    """Sana's cross-attention: where queries and keys are normalised, it is before the heads are split."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "batch query width"],
        encoder_hidden_states: Float[Tensor, "batch key width2"] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Float[Tensor, "batch query width"]:
        query, key = normed(attn, attn.to_q(hidden_states), attn.to_k(encoder_hidden_states))
        query, key, value = (heads(x, attn.heads) for x in (query, key, attn.to_v(encoder_hidden_states)))
        out = self.attend(query, key, value, query.shape[-1] ** -0.5, self._mask(attn, attention_mask, query, key))
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


class SanaLinearAttention(ExplicitAttention):
    """Sana's self-attention, relu(q) relu(k)^T with rows that sum to 1: in the open it takes quadratic memory.

    As diffusers' own it computes in float32, and it has no logits.
    """

    def __call__(
        self, attn: nn.Module, hidden_states: Float[Tensor, "batch query width"], *args: Any, **kwargs: Any
    ) -> Float[Tensor, "batch query width"]:
        query, key = normed(attn, attn.to_q(hidden_states), attn.to_k(hidden_states))
        query, key, value = (heads(x, attn.heads).float() for x in (query, key, attn.to_v(hidden_states)))
        key, value = self._apply("kv", key, value)
        weights = query.relu() @ key.relu().transpose(-1, -2)
        (probs,) = self._apply("probs", weights / (weights.sum(dim=-1, keepdim=True) + 1e-15))
        out = (probs @ value).transpose(1, 2).flatten(2).to(hidden_states.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        return out.clip(-65504, 65504) if out.dtype == torch.float16 else out


class JointAttention(ExplicitAttention):
    """Text and picture in one softmax (SD3, Flux), or the picture alone (SD 3.5's ``attn2``).

    Listeners see the text's rows first, then the picture's, normalised, and with their rotary positions where the
    network has them.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "batch picture width"],
        encoder_hidden_states: Float[Tensor, "batch text width"] | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = (heads(f(hidden_states), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        query, key = normed(attn, query, key)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = [heads(f(encoder_hidden_states), attn.heads) for f in added]
            for i, norm in enumerate((attn.norm_added_q, attn.norm_added_k)):
                text[i] = text[i] if norm is None else norm(text[i])
            query, key, value = (torch.cat(pair, dim=2) for pair in zip(text, (query, key, value), strict=True))
        if image_rotary_emb is not None:
            query, key = (self.rotated(x, image_rotary_emb) for x in (query, key))
        out = self.attend(query, key, value, query.shape[-1] ** -0.5, _bias(attention_mask, query))
        if encoder_hidden_states is None:
            return out if getattr(attn, "pre_only", False) else attn.to_out[1](attn.to_out[0](out))
        length = encoder_hidden_states.shape[1]
        text_out, picture = out[:, :length], out[:, length:]
        text_out = text_out if getattr(attn, "context_pre_only", False) else attn.to_add_out(text_out)
        return attn.to_out[1](attn.to_out[0](picture)), text_out

    def rotated(self, x: Float[Tensor, "batch head length width"], positions: Any) -> Tensor:
        """Queries or keys at their rotary positions."""
        return apply_rotary_emb(x, positions)


class QwenAttention(JointAttention):
    """Qwen-Image's: the padding of the text is not looked at, and positions are complex numbers, for each stream."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "batch picture width"],
        encoder_hidden_states: Float[Tensor, "batch text width"] | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        positions: Any = None if image_rotary_emb is None else torch.cat(image_rotary_emb[::-1])
        if encoder_hidden_states_mask is not None:
            picture = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            attention_mask = torch.cat([encoder_hidden_states_mask.bool(), picture], dim=1)[:, None, None]
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, positions)

    def rotated(self, x: Float[Tensor, "batch head length width"], positions: Any) -> Tensor:
        return turned(x, positions)


class FusedAttention(ExplicitAttention):
    """Flux.2's single blocks: one layer makes queries, keys, values and the feed-forward's input."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "batch length width"],
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Float[Tensor, "batch length width"]:
        made = attn.to_qkv_mlp_proj(hidden_states)
        joined, rest = made.split([3 * attn.inner_dim, made.shape[-1] - 3 * attn.inner_dim], dim=-1)
        query, key, value = (heads(x, attn.heads) for x in joined.chunk(3, dim=-1))
        query, key = normed(attn, query, key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb) for x in (query, key))
        out = self.attend(query, key, value, query.shape[-1] ** -0.5, _bias(attention_mask, query))
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(rest)], dim=-1))


class SingleStreamAttention(ExplicitAttention):
    """Z-Image's: one sequence, which has the picture first and then the text; listeners see the text first.

    Both are padded to multiples of 32 tokens, which count. Every row of a batch has positions of its own.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "batch length width"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        **kwargs,
    ) -> Float[Tensor, "batch length width"]:
        query, key, value = (heads(f(hidden_states), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        query, key = normed(attn, query, key)
        if freqs_cis is not None:
            query, key = (turned(x, freqs_cis[:, None]) for x in (query, key))
        text = self.site.text if self.site.kind == "joint" else 0
        picture = hidden_states.shape[1] - text
        query, key, value = (x.roll(text, dims=2) for x in (query, key, value))
        if attention_mask is not None:
            attention_mask = attention_mask.roll(text, dims=-1)
            attention_mask = attention_mask[:, None, None] if attention_mask.ndim == 2 else attention_mask
        out = self.attend(query, key, value, query.shape[-1] ** -0.5, _bias(attention_mask, query))
        return attn.to_out[1](attn.to_out[0](out.roll(picture, dims=1)))


def turned(x: Float[Tensor, "*batch length width"], positions: Tensor) -> Float[Tensor, "*batch length width"]:
    """Pairs of neighbouring numbers, taken as complex ones, times the positions (length, width / 2); in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * positions).flatten(-2).type_as(x)


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the logits for a mask that is True where attention may look, or is that sum already."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, -torch.inf)


def heads(x: Float[Tensor, "batch length width"], n: int) -> Float[Tensor, "batch head length width2"]:
    """The width split among the heads."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def normed(attn: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys as the layer normalises them, where it does."""
    query = query if attn.norm_q is None else attn.norm_q(query)
    return query, key if attn.norm_k is None else attn.norm_k(key)
