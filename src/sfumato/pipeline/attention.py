"""Watching and changing attention, and tapping features: context managers that restore the network exactly.

While any of them is active, the attention layers it concerns compute their probabilities explicitly; all
others, and all of them afterwards, keep the processors they had. Several compose in the order in which they
were entered: each sees what the earlier ones have made of the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .hooks import attach
from .layers import attention_layers, block_sides, side_of

if TYPE_CHECKING:
    from .base import Text2Image

Stage = Literal["kv", "logits", "probs"]
_STAGES = ("kv", "logits", "probs")


@dataclass(frozen=True)
class AttentionLayer:
    """Where attention happens: layer name in the network, "cross" or "self", side of the feature map."""

    name: str
    kind: str
    resolution: int


@dataclass
class AttentionRecord:
    """What `Text2Image.record_attention` has seen.

    Attributes:
        calls: one entry per call of the network, oldest first: layer -> probabilities, shaped
            (batch, heads, queries, keys), still in the graph if the call was. Queries run over the rows of a
            square feature map with side ``layer.resolution``; keys of cross-attention are the prompt's
            tokens.
    """

    calls: list[dict[AttentionLayer, Float[Tensor, "batch head query key"]]] = field(default_factory=list)

    @property
    def maps(self) -> dict[AttentionLayer, Float[Tensor, "batch head query key"]]:
        """The latest call's probabilities."""
        return self.calls[-1]


@dataclass(frozen=True, eq=False)
class _Listener:
    stage: Stage
    wanted: Callable[[AttentionLayer], bool]
    function: Callable[..., Any]


@contextmanager
def record(
    p: Text2Image, kind: str | None, where: Callable[[AttentionLayer], bool], keep: int | None
) -> Iterator[AttentionRecord]:
    """See `Text2Image.record_attention`."""
    seen = AttentionRecord()

    def note(layer: AttentionLayer, probs: Tensor) -> Tensor:
        if not seen.calls or layer in seen.calls[-1]:
            seen.calls.append({})
            if keep is not None:
                del seen.calls[:-keep]
        seen.calls[-1][layer] = probs
        return probs

    with edit(p, note, kind, where, "probs"):
        yield seen


@contextmanager
def edit(
    p: Text2Image, function: Callable, kind: str | None, where: Callable[[AttentionLayer], bool], stage: Stage
) -> Iterator[None]:
    """See `Text2Image.edit_attention`."""
    if stage not in _STAGES:
        raise BadInput(f"unknown stage of attention {stage!r}: use one of {', '.join(_STAGES)}")
    if kind not in (None, "cross", "self"):
        raise BadInput(f"unknown kind of attention {kind!r}: use 'cross', 'self' or None for both")
    listener = _Listener(stage, lambda layer: kind in (None, layer.kind) and where(layer), function)
    p.listeners.append(listener)
    try:
        _install(p.network, p.listeners)
        yield
    finally:
        p.listeners.remove(listener)
        _install(p.network, p.listeners)


@contextmanager
def tap(p: Text2Image, where: str, function: Callable[[Any], Any] | None) -> Iterator[Tap]:
    """See `Text2Image.tap`."""
    modules = dict(p.network.named_modules())
    name = {"bottleneck": "mid_block"}.get(where, where)
    if not name or name not in modules:
        raise BadInput(
            f"no place {where!r} in this network: use 'bottleneck', or a module's name like 'up_blocks.0'"
        )
    seen = Tap()

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        changed = output if function is None else function(output)
        seen.value = changed
        return changed

    handle = attach(modules[name], hook)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass
class Tap:
    """What `Text2Image.tap` has seen: the latest output of the place, after replacement, in the graph."""

    value: Any = None


class ExplicitAttention:
    """A diffusers attention processor that computes softmax(q k^T / sqrt(d)) v in the open, for listeners.

    Without listeners it equals diffusers' own processors up to rounding. Projections are called as modules,
    so adapters on them act as ever.
    """

    def __init__(self, layer: AttentionLayer, listeners: list[_Listener], original: Any):
        self.layer, self.listeners, self.original = layer, listeners, original

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch query width"],
        encoder_hidden_states: Float[Tensor, "batch key width2"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs,
    ) -> Float[Tensor, "batch query width"]:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query = _heads(attn.to_q(hidden_states), attn.heads)
        key, value = self._apply(
            "kv", _heads(attn.to_k(context), attn.heads), _heads(attn.to_v(context), attn.heads)
        )
        logits = query @ key.transpose(-1, -2) * attn.scale
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, key.shape[-2], len(query))
            logits = logits + mask.view(len(query), attn.heads, -1, mask.shape[-1])
        (logits,) = self._apply("logits", logits)
        # In half precision softmax loses the small probabilities; diffusers' fused kernels sum in float32,
        # too.
        probs = (
            logits.float().softmax(dim=-1)
            if logits.dtype in (torch.float16, torch.bfloat16)
            else logits.softmax(-1)
        )
        (probs,) = self._apply("probs", probs)
        out = (probs.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def _apply(self, stage: Stage, *tensors: Tensor) -> tuple[Tensor, ...]:
        for listener in self.listeners:
            if listener.stage == stage:
                result = listener.function(self.layer, *tensors)
                tensors = result if isinstance(result, tuple) else (result,)
        return tensors


def _heads(x: Float[Tensor, "batch length width"], heads: int) -> Float[Tensor, "batch head length width2"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _install(network: nn.Module, listeners: list[_Listener]) -> None:
    """Give every attention layer the processor that its listeners need, or its original one."""
    sides = block_sides(network)
    for name, kind, attn in attention_layers(network):
        layer = AttentionLayer(name, kind, side_of(name, sides))
        current = attn.processor
        original = current.original if isinstance(current, ExplicitAttention) else current
        wanted = [x for x in listeners if x.wanted(layer)]
        if wanted:
            attn.set_processor(ExplicitAttention(layer, wanted, original))
        elif current is not original:
            attn.set_processor(original)
