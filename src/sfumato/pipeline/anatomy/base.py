"""What a denoising network is made of, and how it is called: one vocabulary for all methods and architectures."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from ..conditioning import Conditioning
from .explicit import ExplicitAttention, Listener

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
    """

    rows: Bool[Tensor, "batch"] | None = None
    step: int | None = None
    text: int = 0
    own: bool = False

    @contextmanager
    def during(self, **facts: Any) -> Iterator[None]:
        """These facts hold for the length of the block."""
        before = {name: getattr(self, name) for name in facts}
        vars(self).update(facts)
        try:
            yield
        finally:
            vars(self).update(before)


_contexts: WeakKeyDictionary[nn.Module, Context] = WeakKeyDictionary()


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
    """

    anatomy: Anatomy
    z: Float[Tensor, "batch channel height width"]
    timestep: Tensor | float
    inputs: dict[str, Any]
    rows: Bool[Tensor, "batch"] | None = None
    step: int | None = None

    @property
    def network(self) -> nn.Module:
        return self.anatomy.network

    @property
    def cond(self) -> Conditioning:
        """What the network is told of the text, without prompts and token ids (-1), which it does not know."""
        return self.anatomy.conditioning(self.inputs).replace(conditional=self.rows)


class Anatomy(ABC):
    """A network's parts by the names that all methods share, and the way to call it.

    Attributes:
        network: the network.
        component: what pipelines call it, which is also the prefix of its LoRA keys.
        output: the type of diffusers' own result.
    """

    component: ClassVar[str] = "transformer"
    output: ClassVar[Callable[..., Any]]
    first: ClassVar[str] = "hidden_states"
    """The name that the network's forward has for its noisy input."""
    subsets: ClassVar[Mapping[str, Callable[[str], bool]]]
    """Which parameter names belong to a set."""

    def __init__(self, network: nn.Module):
        self.network = network

    # Parts

    @abstractmethod
    def sites(self) -> list[Site]:
        """Every place of attention, in network order."""

    @abstractmethod
    def blocks(self) -> tuple[str, ...]:
        """The names of the modules that make up the trunk, in the order in which they run."""

    @abstractmethod
    def every_projection(self) -> list[Projection]:
        """All projections, in network order."""

    @property
    @abstractmethod
    def transformers(self) -> tuple[str, ...]:
        """The names of the modules whose layers the adapter target "transformer" means."""

    @property
    @abstractmethod
    def bottleneck(self) -> str:
        """The module in the middle."""

    @property
    @abstractmethod
    def last(self) -> nn.Module:
        """The layer that makes the output, which whatever runs the network in parts runs too."""

    @property
    def channels(self) -> int:
        """Of the latent."""
        return self.network.config.in_channels

    @property
    def side(self) -> int:
        """Of the latent, at the default picture size."""
        size = self.network.config.sample_size
        return size if isinstance(size, int) else size[0]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of projections that this network has."""
        found = {p.kind for p in self.every_projection()}
        return tuple(kind for kind in KINDS if kind in found)

    def check_kinds(self, kinds: Sequence[str]) -> None:
        """Raise `BadInput` for a kind of projection that this network does not have."""
        for kind in kinds:
            if kind not in KINDS:
                raise BadInput(f"unknown projection {kind!r}: choose from {', '.join(self.kinds)}")
            if kind not in self.kinds:
                raise BadInput(f"a {self.name} has no projections {kind!r}: it has {', '.join(self.kinds)}")

    def projections(self, kinds: Sequence[str] = ()) -> list[Projection]:
        """The projections of the given kinds (all if none is given), in network order.

        Raises:
            BadInput: a kind that is unknown, or that this network does not have.
        """
        self.check_kinds(kinds)
        return [p for p in self.every_projection() if not kinds or p.kind in kinds]

    def parameters(self, subset: str) -> dict[str, nn.Parameter]:
        """The network's parameters in one of the named subsets; see `Text2Image.parameters`.

        Raises:
            BadInput: unknown subset, or one that selects nothing in this network.
        """
        if subset not in SUBSETS:
            raise BadInput(f"unknown set of parameters {subset!r}: choose from {', '.join(SUBSETS)}")
        chosen = self._subset(subset)
        if not chosen:
            others = ", ".join(other for other in SUBSETS if self._subset(other))
            raise BadInput(f"the set of parameters {subset!r} is empty in a {self.name}: choose from {others}")
        return chosen

    def targets(self, targets: str | Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
        """The layers that an adapter is for, by name, in network order.

        Args:
            targets: one or several of: "transformer" (every Linear and Conv2d inside the transformer blocks,
                projections in and out and feed-forward included), kinds of projections ("cross.k", ...), names of
                layers.

        Raises:
            BadInput: unknown target, or none.
        """
        chosen: set[str] = set()
        layers = {n: m for n, m in self.network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        inside = tuple(f"{n}." for n in self.transformers)
        for target in (targets,) if isinstance(targets, str) else targets:
            if target == "transformer":
                chosen |= {n for n in layers if n.startswith(inside)}
            elif target in KINDS:
                chosen |= {p.name for p in self.projections((target,))}
            elif target in layers:
                chosen.add(target)
            else:
                raise BadInput(
                    f"unknown adapter target {target!r}: use 'transformer' or some of {', '.join(self.kinds)}"
                )
        if not chosen:
            raise BadInput(f"the adapter targets {targets!r} select no layer of this network")
        return {n: m for n, m in layers.items() if n in chosen}

    def place(self, where: str) -> str:
        """The module that a tap is for: "bottleneck", or any module's name.

        Raises:
            BadInput: no such place.
        """
        name = self.bottleneck if where == "bottleneck" else where
        if not name or name not in dict(self.network.named_modules()):
            raise BadInput(
                f"no place {where!r} in this network: use 'bottleneck', or a module's name like {self.blocks()[-1]!r}"
            )
        return name

    # Attention

    def check_site_kind(self, kind: str | None) -> None:
        """Raise `BadInput` for a kind of attention that this network does not have; None is all that it has."""
        if kind not in (None, "cross", "self", "joint"):
            raise BadInput(f"unknown kind of attention {kind!r}: use 'cross', 'self', 'joint' or None for all")
        has = dict.fromkeys(site.kind for site in self.sites())
        if kind is not None and kind not in has:
            raise BadInput(f"a {self.name} has no {kind} attention: it has {' and '.join(has)} attention")

    def explicit(self, site: Site, listeners: list[Listener], original: Any) -> Any:
        """The processor that computes this site's attention in the open, in the place of ``original``."""
        return ExplicitAttention(site, listeners, original)

    # Calls

    @property
    def name(self) -> str:
        """The class of the network."""
        return type(self.network).__name__

    @property
    def context(self) -> Context:
        """What is known of the call in progress; one for a network, however many look at it."""
        return _contexts.setdefault(self.network, Context())

    def call(
        self,
        z: Float[Tensor, "batch channel height width"],
        time: Float[Tensor, "batch"],
        cond: Conditioning,
        guidance: float | None = None,
    ) -> Float[Tensor, "batch channel height width"]:
        """Run the network.

        Args:
            z: noisy latent, never packed.
            time: the network's own number, one for each row.
            cond: as many rows as ``z``.
            guidance: what a network is told that guidance was distilled into; others take none.
        """
        args, kwargs = self.arguments(z.to(self.network.dtype), time, self.inputs(z, cond, guidance))
        with self.context.during(own=True, rows=cond.conditional, step=None):
            out = self.network(*args, **kwargs, return_dict=False)[0]
        return self.prediction(out, z).to(z.dtype)

    @abstractmethod
    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        """All that the network takes besides ``z`` and its number, by name."""

    @abstractmethod
    def conditioning(self, inputs: dict[str, Any]) -> Conditioning:
        """What `inputs` makes of a conditioning, read back."""

    def arguments(
        self, z: Tensor, timestep: Tensor | float, inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The network's positional and named arguments."""
        return (self.packed(z),), {"timestep": timestep, **inputs}

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call of the network's forward as anybody may write it, positional or by keyword, without its
        ``return_dict``."""
        given = dict(self._signature.bind(self.network, *args, **kwargs).arguments)
        given = {k: v for k, v in list(given.items())[1:] if k != "return_dict"}
        z, timestep = given.pop(self.first), given.pop("timestep")
        return Call(self, self.unpacked(z, given), timestep, given)

    def asks_for_dict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call wants the result in diffusers' own type, and not as a tuple."""
        return self._signature.bind(self.network, *args, **kwargs).arguments.get("return_dict", True)

    def timestep(self, number: Tensor | float) -> Tensor:
        """The scheduler's timestep of the network's own number."""
        return torch.as_tensor(number).float()

    def packed(self, z: Float[Tensor, "batch channel height width"]) -> Tensor:
        """The form in which the network takes latents."""
        return z

    def unpacked(self, z: Tensor, inputs: dict[str, Any]) -> Float[Tensor, "batch channel height width"]:
        """The inverse of `packed`, for a call with these inputs."""
        return z

    def prediction(self, out: Tensor, z: Tensor) -> Float[Tensor, "batch channel height width"]:
        """The network's output without what it says besides the prediction, in the form of ``z``."""
        return out[:, : z.shape[1]]

    def result(self, prediction: Tensor, out: Tensor | None) -> Tensor:
        """The inverse of `prediction`: what the network's caller expects, with the rest of its own output ``out``."""
        if out is None or out.shape[1] == prediction.shape[1]:
            return prediction
        rest = out[:, prediction.shape[1] :]
        return torch.cat([prediction, rest if len(rest) == len(prediction) else torch.zeros_like(prediction)], dim=1)

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(type(self.network).forward)

    def _subset(self, subset: str) -> dict[str, nn.Parameter]:
        chosen = (lambda name: True) if subset == "full" else self.subsets[subset]
        return {name: p for name, p in self.network.named_parameters() if chosen(name)}


def foreign(tokens: Tensor, mask: Tensor | None = None, **others: Any) -> Conditioning:
    """A conditioning of which the embeddings are known, and not the words."""
    ids = torch.full(tokens.shape[:2], -1, device=tokens.device)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return replace(Conditioning(tokens, ids, seen), **others)
