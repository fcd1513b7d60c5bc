"""Watching and changing attention, and tapping features: context managers that restore the network exactly.

While any of them is active, the attention layers it concerns compute their probabilities explicitly; all
others, and all of them afterwards, keep the processors they had. Several compose in the order in which they
were entered: each sees what the earlier ones have made of the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .anatomy import Anatomy, Site
from .anatomy.explicit import STAGES, ExplicitAttention, Listener, Stage
from .hooks import attach

if TYPE_CHECKING:
    from .base import Text2Image

@dataclass
class AttentionRecord:
    """What `Text2Image.record_attention` has seen.

    Attributes:
        calls: one entry per call of the network, oldest first: layer -> probabilities, shaped
            (batch, heads, queries, keys), still in the graph if the call was. Queries run over the rows of a
            square feature map with side ``layer.resolution``; keys of cross-attention are the prompt's
            tokens.
    """

    calls: list[dict[Site, Float[Tensor, "batch head query key"]]] = field(default_factory=list)

    @property
    def maps(self) -> dict[Site, Float[Tensor, "batch head query key"]]:
        """The latest call's probabilities."""
        return self.calls[-1]


@contextmanager
def record(
    p: Text2Image, kind: str | None, where: Callable[[Site], bool], keep: int | None
) -> Iterator[AttentionRecord]:
    """See `Text2Image.record_attention`."""
    seen = AttentionRecord()

    def note(site: Site, probs: Tensor) -> Tensor:
        if not seen.calls or site in seen.calls[-1]:
            seen.calls.append({})
            if keep is not None:
                del seen.calls[:-keep]
        seen.calls[-1][site] = probs
        return probs

    with edit(p, note, kind, where, "probs"):
        yield seen


@contextmanager
def edit(
    p: Text2Image, function: Callable, kind: str | None, where: Callable[[Site], bool], stage: Stage
) -> Iterator[None]:
    """See `Text2Image.edit_attention`."""
    if stage not in STAGES:
        raise BadInput(f"unknown stage of attention {stage!r}: use one of {', '.join(STAGES)}")
    p.anatomy.check_site_kind(kind)
    listener = Listener(stage, lambda site: kind in (None, site.kind) and where(site), function)
    p.listeners.append(listener)
    try:
        _install(p.anatomy, p.listeners)
        yield
    finally:
        p.listeners.remove(listener)
        _install(p.anatomy, p.listeners)


@contextmanager
def tap(p: Text2Image, where: str, function: Callable[[Any], Any] | None) -> Iterator[Tap]:
    """See `Text2Image.tap`."""
    place = p.network.get_submodule(p.anatomy.place(where))
    seen = Tap()

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        changed = output if function is None else function(output)
        seen.value = changed
        return changed

    handle = attach(place, hook)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass
class Tap:
    """What `Text2Image.tap` has seen: the latest output of the place, after replacement, in the graph."""

    value: Any = None


def _install(anatomy: Anatomy, listeners: list[Listener]) -> None:
    """Give every attention layer the processor that its listeners need, or its original one."""
    for site in anatomy.sites():
        current = site.module.processor
        original = current.original if isinstance(current, ExplicitAttention) else current
        wanted = [x for x in listeners if x.wanted(site)]
        if wanted:
            site.module.set_processor(anatomy.explicit(site, wanted, original))
        elif current is not original:
            site.module.set_processor(original)
