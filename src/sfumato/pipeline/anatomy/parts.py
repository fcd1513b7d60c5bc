"""The words for what is inside a network: sites of attention, projections, calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..conditioning import Conditioning

KINDS = (
    *(f"{where}.{what}" for where in ("cross", "self", "joint", "text") for what in ("q", "k", "v", "out")),
    "text.in",
    "pooled.in",
)
"""Every kind of projection that some network has: of cross- and self-attention; of joint attention, those of its
picture side and of single streams ("joint") and of its text side ("text"); the linear maps that read the text encoders'
embeddings ("text.in" per token, "pooled.in" pooled)."""

SUBSETS = ("full", "xattn", "xattn-strict", "noxattn", "selfattn")
"""Every set of parameters that methods ask for; see `Text2Image.parameters`."""


@dataclass
class Context:
    """What is known of the call of the network in progress, for whoever looks at it from inside.

    Attributes:
        rows: which rows of the batch are conditional; None where there is no guidance, or none is known of.
        step: the number of the sampling step, from 0; None outside of sampling.
        text: how many tokens of text the network was given.
        own: whether `Anatomy.call` made the call, and not diffusers' pipeline.
        cond: what `Anatomy.call` was given.
    """

    rows: Bool[Tensor, "batch"] | None = None
    step: int | None = None
    text: int = 0
    own: bool = False
    cond: Conditioning | None = None

    @contextmanager
    def during(self, **facts: Any) -> Iterator[None]:
        """These facts hold for the length of the block."""
        before = {name: getattr(self, name) for name in facts}
        vars(self).update(facts)
        try:
            yield
        finally:
            vars(self).update(before)


@dataclass(frozen=True)
class Site:
    """Where attention happens.

    Attributes:
        name: the attention layer's name inside the network.
        kind: "cross", "self", or "joint": text and picture in one softmax. There queries and keys are the text's
            tokens first, then the picture's, in all networks.
        resolution: side of the feature map at which it happens, at the pipeline's default picture size.
        module: the attention layer.
    """

    name: str
    kind: str
    resolution: int
    module: nn.Module = field(compare=False, repr=False)
    context: Context = field(compare=False, repr=False)

    @property
    def rows(self) -> Bool[Tensor, "batch"] | None:
        """Which rows of the batch in progress are conditional; None where there is no guidance."""
        return self.context.rows

    @property
    def step(self) -> int | None:
        """The sampling step in progress, from 0; None outside of sampling."""
        return self.context.step

    @property
    def text(self) -> int:
        """How many tokens of text there are in the call in progress: in joint attention, the first of the sequence."""
        return self.context.text


@dataclass(frozen=True)
class Projection:
    """One linear projection.

    Attributes:
        name: the module's name inside the network, e.g.
            ``mid_block.attentions.0.transformer_blocks.0.attn2.to_k``.
        kind: one of `KINDS`.
        module: the linear layer; closed-form edits write to ``module.weight`` of a copy that owns it.
        resolution: side of the latent feature map at which the layer acts, at the pipeline's default picture
            size; 0 for those that act before there is a picture ("text.in", "pooled.in").
    """

    name: str
    kind: str
    module: nn.Linear
    resolution: int

    @property
    def weight(self) -> Float[nn.Parameter, "out in"]:
        return self.module.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(output width, input width)."""
        return tuple(self.module.weight.shape)


class Called(Protocol):
    """What a `Call` asks of the `Anatomy` that was called."""

    @property
    def network(self) -> nn.Module: ...
    @property
    def context(self) -> Context: ...
    def conditioning(self, inputs: dict[str, Any]) -> Conditioning: ...
    def retold(self, inputs: dict[str, Any], cond: Conditioning) -> dict[str, Any]: ...
    def text_length(self, inputs: dict[str, Any]) -> int: ...


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the network, whoever made it and in whatever form.

    Attributes:
        anatomy: of the network that is called.
        z: its input, as scaled by the scheduler, never packed; with guidance, both halves.
        timestep: the network's own number, one for all rows, or one a row.
        inputs: all else that it is given, by name (``encoder_hidden_states``, ``added_cond_kwargs``, ...).
        rows: which rows are conditional; None where there is no guidance, or none is known of.
        step: the number of the sampling step, from 0; None outside of sampling.
        encoded: gives `said`.
        larger: the number of the call that this one, for a smaller picture, is made for; None where it is for none.
        until: the step from which on attention is changed otherwise than in this one; None: in none of the run.
    """

    anatomy: Called
    z: Float[Tensor, "batch channel height width"]
    timestep: Tensor | float
    inputs: dict[str, Any]
    rows: Bool[Tensor, "batch"] | None = None
    step: int | None = None
    encoded: Callable[[], Conditioning | None] = lambda: None
    larger: Tensor | float | None = None
    until: int | None = None

    @property
    def network(self) -> nn.Module:
        return self.anatomy.network

    def told(self) -> AbstractContextManager[None]:
        """Whoever looks at the network from inside sees, in the block, that this call is in progress."""
        facts = {"rows": self.rows, "step": self.step, "text": self.anatomy.text_length(self.inputs)}
        return self.anatomy.context.during(**facts)

    @property
    def cond(self) -> Conditioning:
        """What the network is told of the text, without prompts and token ids (-1), which it does not know."""
        return self.anatomy.conditioning(self.inputs).replace(conditional=self.rows)

    @property
    def said(self) -> Conditioning | None:
        """The prompts behind the conditional rows, one row each, as they were encoded: with texts, ids and roles; None
        where they are not known, as of embeddings that diffusers' own call was given."""
        return self.encoded()

    def retold(self, cond: Conditioning) -> Call:
        """The same call with the tokens and the pooled embedding of ``cond``, which has one row for each of its own."""
        return replace(self, inputs=self.anatomy.retold(self.inputs, cond))
