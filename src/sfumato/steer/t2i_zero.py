"""Multi-Concept T2I-Zero: concepts corrected in the embeddings, and kept apart in attention (arXiv:2310.07419)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, Positive, Share
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.conditioning import Role
from sfumato.pipeline.steering import Place

from .base import Patch
from .parts.concepts import Concepts
from .parts.retelling import Retelling, sections
from .parts.similarity import Mode, Order, cbs, similarities
from .parts.suppression import Suppression, ctnms

__all__ = ["Mode", "Order", "T2IZero", "cbs", "ctnms", "similarities"]


@dataclass(frozen=True, kw_only=True)
class T2IZero(Patch):
    """Helps prompts with several concepts, without training (arXiv:2310.07419, algorithms 1 and 2).

    Correction by similarities (CbS, `cbs`) rewrites each concept's embedding from its nearest rows, so that it says
    less of far ones. Cross-token non-maximum suppression (CTNMS, `ctnms`) lets every pixel, in every head, attend to
    one concept only: that whose map, smoothed over the pixels, is the largest there. Both act in the conditional half
    of guidance alone.

    Concepts are named, or given as numbers of tokens, or found in each prompt: its runs of words between articles,
    prepositions and the like, so that "a red star and a blue circle" has two. A concept of several tokens is one: CbS
    corrects each of its tokens, CTNMS takes the mean (or the largest) of their maps and keeps or suppresses them
    together.

    Works on every family. Where text and picture share one attention (SD3, Flux, Qwen-Image, Z-Image) the pixels'
    rows are suppressed at the columns of the text; where several encoders' rows stand one after the other, each one's
    are corrected among themselves. It acts in sampling runs only.

    Cost: CbS some products of one row with all, once a prompt. CTNMS: attention with explicit probabilities at the
    layers concerned (a buffer of heads x pixels x tokens each; in joint attention (text + pixels) squared), at all
    steps, also those at which nothing is suppressed; there pictures differ from the plain ones by rounding.

    Raises:
        BadInput: a name that a prompt does not have, or that its context cuts off; embeddings of unknown text.

    Reconstructed: the paper gives no values for alpha, gamma, tau and the steps: those here are ours. The padding of
    the smoothing (reflected) is ours too, and that the window never reaches start, end and padding.

    Differs from the paper: S is normalised before it is compared with tau in [0, 1] (``cbs_order``); only the concepts
    compete (``ctnms_scope``), where the one-hot of algorithm 2 also zeroes all other tokens.
    """

    NEUTRAL: ClassVar[Mapping[str, Any]] = {"cbs_strength": 0.0, "ctnms_strength": 0.0}
    """Neither part acts."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "listing": {"ctnms_scope": "all", "ctnms_steps": (0.0, 1.0)},
        "sd": {"ctnms_sides": (16, 32)},
        "quantile": {"cbs_mode": "quantile", "cbs_threshold": 0.5, "ctnms_strength": 0.1},
    }
    """Settings by name: algorithm 2 to the letter; the layers of Stable Diffusion at 512 pixels whose maps survive
    smoothing; the thresholds and strength of a third-party implementation."""

    place: ClassVar[Place] = "conditioning"

    concepts: tuple[str, ...] = ()
    """Words or phrases of the prompt, one concept each; none: those found in it."""
    tokens: tuple[Natural, ...] = ()
    """Concepts as numbers of tokens instead, from 0, the start token included."""
    cbs_strength: Share = 0.5
    """alpha: how much of a concept's embedding is rewritten; 0 is none."""
    cbs_window: Natural = 2
    """gamma: how many tokens away, on either side, the others may be."""
    cbs_threshold: Share = 0.3
    """tau: what is less similar than this counts nothing."""
    cbs_mode: Mode = "relative"
    """What the threshold is compared with: products over the largest one, their quantiles, or cosines of rows."""
    cbs_order: Order = "normalise_first"
    """In the relative mode, divide by the largest product before the threshold or after it."""
    cbs_rescale: bool = False
    """Give what is written the length of what was there (not in the paper)."""
    ctnms_strength: Share = 1.0
    """How far the suppressed maps take the place of the maps; 0 is not at all."""
    ctnms_steps: tuple[Share, Share] = (0.0, 0.5)
    """Suppress from this share of the steps to that one."""
    ctnms_sides: tuple[Count, ...] = ()
    """Sides of the feature maps, at the default picture size, at which to suppress; none is all, as in the paper."""
    ctnms_scope: Literal["concepts", "all"] = "concepts"
    """What a pixel's winner suppresses: the other concepts, or all other tokens."""
    ctnms_span: Literal["mean", "max"] = "mean"
    """The map of a concept of several tokens."""
    ctnms_renorm: bool = False
    """Bring every pixel's probabilities back to the sum 1 (not in the paper)."""
    ctnms_kernel: Count = 3
    """Width of the Gaussian that smooths the maps, in pixels of theirs; odd, 1 is no smoothing."""
    ctnms_sigma: Positive = 1.0
    """Its standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.concepts and self.tokens:
            raise BadInput("give concepts by name or as tokens, not both")
        if len({c.strip().lower() for c in self.concepts} - {""}) < len(self.concepts):
            raise BadInput("every concept needs a name of its own: one is empty, or named twice")
        if self.ctnms_kernel % 2 == 0:
            raise BadInput(f"ctnms_kernel must be odd, got {self.ctnms_kernel}")
        if self.ctnms_steps[0] >= self.ctnms_steps[1]:
            raise BadInput("ctnms_steps must begin before they end, as in 0 0.5")

    @contextmanager
    def acting(self, p: Text2Image) -> Iterator[dict[str, Any]]:
        concepts = Concepts(p, self.concepts, self.tokens)
        told: dict[str, Any] = {"concepts": concepts.found}
        with ExitStack() as stack:
            if self.cbs_strength:
                retelling = Retelling(lambda cond: self._corrected(p, cond, concepts, told))
                stack.enter_context(p.intercept(retelling, self.place))
            if self.ctnms_strength:
                options: dict[str, Any] = {"kernel": self.ctnms_kernel, "sigma": self.ctnms_sigma}
                options |= {"scope": self.ctnms_scope}
                options |= {"span": self.ctnms_span, "strength": self.ctnms_strength, "renorm": self.ctnms_renorm}
                suppression = Suppression(concepts.rows, p.anatomy.side, self.ctnms_steps, options)
                stack.enter_context(p.intercept(suppression, "attention"))
                kind = self._kind(p)
                wanted = lambda site: not self.ctnms_sides or site.resolution in self.ctnms_sides
                stack.enter_context(p.edit_attention(suppression.edit, kind, wanted))
            yield told

    def _corrected(
        self, p: Text2Image, cond: Conditioning, concepts: Concepts, told: dict[str, Any]
    ) -> Conditioning:
        tokens, rows = cond.tokens, concepts.rows(cond).any(dim=1)
        words = None if cond.roles is None else cond.roles == Role.WORD
        parts = [
            cbs(
                tokens[:, s], rows[:, s], self.cbs_strength, self.cbs_window, self.cbs_threshold, mode=self.cbs_mode,
                order=self.cbs_order, words=None if words is None else words[:, s], rescale=self.cbs_rescale,
            )
            for s in sections(p, cond)
        ]  # fmt: skip
        corrected = torch.cat(parts, dim=1)
        if bool(rows.any()):
            ratio = corrected[rows].float().norm(dim=-1) / tokens[rows].float().norm(dim=-1)
            told["length after correction"] = round(float(ratio.mean()), 3)
        return cond.replace(tokens=corrected)

    def _kind(self, p: Text2Image) -> str:
        """The kind of attention between pixels and text, at which the patch acts.

        Raises:
            BadInput: there is none at the sides asked for.
        """
        sites = p.anatomy.sites()
        kind = "cross" if any(site.kind == "cross" for site in sites) else "joint"
        sides = sorted({site.resolution for site in sites if site.kind == kind})
        if self.ctnms_sides and not set(self.ctnms_sides) & set(sides):
            raise BadInput(
                f"no {kind} attention of this network is at sides {', '.join(map(str, self.ctnms_sides))}: "
                f"choose from {', '.join(map(str, sides))}"
            )
        return kind
