"""Watching and changing attention, and tapping features: context managers that restore the network exactly.

While any of them is active, the attention layers it concerns compute their probabilities explicitly; all
others, and all of them afterwards, keep the processors they had. Several compose in the order in which they
were entered: each sees what the earlier ones have made of the attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .anatomy import Anatomy, Site
from .anatomy.explicit import STAGES, ExplicitAttention, Listener, Stage
from .hooks import attach
from .organs import Organs
from .steering import held


@dataclass
class AttentionRecord:
    """What `Text2Image.record_attention` has seen.

    Attributes:
        calls: one entry per call of the network, oldest first: site -> probabilities, shaped
            (batch, heads, queries, keys), still in the graph if the call was. Queries run over the rows of a
            square feature map with side ``site.resolution``; keys of cross-attention are the prompt's
            tokens. In joint attention both run over the prompt's tokens, and then the feature map. Z-Image pads the
            latter to a multiple of 32.
        rows: for each of them, which rows of the batch are conditional; None where there was no guidance.
        steps: for each of them, the number of the sampling step, from 0; None outside of sampling.
    """

    calls: list[dict[Site, Float[Tensor, "batch head query key"]]] = field(default_factory=list)
    rows: list[Bool[Tensor, "batch"] | None] = field(default_factory=list)
    steps: list[int | None] = field(default_factory=list)

    @property
    def maps(self) -> dict[Site, Float[Tensor, "batch head query key"]]:
        """The latest call's probabilities."""
        return self.calls[-1]

    @property
    def conditional(self) -> dict[Site, Float[Tensor, "picture head query key"]]:
        """The latest call's probabilities of its conditional rows; of all where there was no guidance."""
        rows = self.rows[-1]
        return self.maps if rows is None else {site: probs[rows] for site, probs in self.maps.items()}


def pixels_of(site: Site, queries: int, latent: tuple[int, int], side: int) -> tuple[slice, tuple[int, int]]:
    """Which queries of the call in progress are pixels, and height and width of the feature map that they are.

    Args:
        latent: height and width of the call's latent.
        side: of the latent at the default picture size, `Anatomy.side`.
    """
    if site.kind != "joint":
        return slice(0, queries), grid(queries, *latent)
    # Not by their number: behind the pixels there may be padding.
    height, width = (site.resolution * x // side for x in latent)
    return slice(site.text, site.text + height * width), (height, width)


def grid(pixels: int, height: int, width: int) -> tuple[int, int]:
    """The sides of a feature map with so many pixels, of all that there could be the nearest to a latent's shape."""
    sides = [(h, pixels // h) for h in range(1, pixels + 1) if pixels % h == 0]
    return min(sides, key=lambda s: abs(math.log(s[0] * width / (s[1] * height))))


@contextmanager
def record(
    p: Organs, kind: str | None, where: Callable[[Site], bool], keep: int | None
) -> Iterator[AttentionRecord]:
    """See `Text2Image.record_attention`."""
    seen = AttentionRecord()

    def note(site: Site, probs: Tensor) -> Tensor:
        if not seen.calls or site in seen.calls[-1]:
            told: list[tuple[list[Any], Any]] = [(seen.calls, {}), (seen.rows, site.rows), (seen.steps, site.step)]
            for noted, value in told:
                noted.append(value)
                if keep is not None:
                    del noted[:-keep]
        seen.calls[-1][site] = probs
        return probs

    with edit(p, note, kind, where, "probs"):
        yield seen


@contextmanager
def edit(
    p: Organs, function: Callable, kind: str | None, where: Callable[[Site], bool], stage: Stage
) -> Iterator[None]:
    """See `Text2Image.edit_attention`."""
    if stage not in STAGES:
        raise BadInput(f"unknown stage of attention {stage!r}: use one of {', '.join(STAGES)}")
    p.anatomy.check_site_kind(kind)
    listener = Listener(stage, lambda site: kind in (None, site.kind) and where(site), function)
    with held(p):  # which tells the sites of step and rows, whoever calls the network
        quiet = listen(p, listener)
        try:
            yield
        finally:
            quiet()


def listen(p: Organs, *listeners: Listener) -> Callable[[], None]:
    """Let these look at attention from now on, until the function that this gives back is called.

    Nobody tells their sites of steps, and of rows only while `Text2Image.draw` or the `denoiser` makes the call.
    """
    p.listeners.extend(listeners)

    def quiet() -> None:
        for listener in listeners:
            p.listeners.remove(listener)
        _install(p.anatomy, p.listeners)

    try:
        _install(p.anatomy, p.listeners)
    except BadInput:
        quiet()
        raise
    return quiet


@contextmanager
def tap(p: Organs, where: str, function: Callable[[Any], Any] | None) -> Iterator[Tap]:
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
        if wanted and isinstance(original, nn.Module):  # it has weights, as an IP-Adapter's, that would not act
            raise BadInput(
                f"attention cannot be looked into beside {type(original).__name__}: take it off the pipeline first"
            )
        if wanted:
            site.module.set_processor(anatomy.explicit(site, wanted, original))
        elif current is not original:
            site.module.set_processor(original)
