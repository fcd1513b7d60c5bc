"""What a denoising network is made of, and how it is called: one vocabulary for all methods and architectures."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from ..conditioning import Conditioning
from .explicit import ExplicitAttention, Listener
from .parts import KINDS, SUBSETS, Call, Context, Projection, Site

_contexts: WeakKeyDictionary[nn.Module, Context] = WeakKeyDictionary()


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
    told: ClassVar[str] = "timestep"
    """The name that it has for its number."""
    subsets: ClassVar[Mapping[str, Callable[[str], bool]]]
    """Which parameter names belong to a set."""
    default_guidance: float = 1.0
    """What a network is told that guidance was distilled into, where nothing else is asked for."""

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
            targets: one or several of: "transformer" (every Linear, and Conv2d without groups, inside the transformer
                blocks, projections in and out and feed-forward included), kinds of projections ("cross.k", ...),
                names of layers.

        Raises:
            BadInput: unknown target, or none.
        """
        chosen: set[str] = set()
        layers = {n: m for n, m in self.network.named_modules() if takes_adapter(m)}
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
    def dtype(self) -> torch.dtype:
        """What the network computes in, by its first weight; diffusers' own property walks all modules each time."""
        kept = getattr(self.network, "_keep_in_fp32_modules", None) or ()
        for name, x in self.network.named_parameters():
            # Weights of one byte are only stored so: the hooks that cast them know what is computed in.
            if x.is_floating_point() and x.itemsize > 1 and not any(word in name for word in kept):
                return x.dtype
            if x.itemsize == 1:
                break
        return self.network.dtype

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
            guidance: what a network is told that guidance was distilled into, instead of what ``cond`` says of it;
                others take none.
        """
        args, kwargs = self.arguments(z.to(self.dtype), time, self.inputs(z, cond, guidance))
        facts = {"rows": cond.conditional, "step": None, "text": self.text_length(kwargs), "cond": cond}
        with self.context.during(own=True, **facts):
            out = self.network(*args, **kwargs, return_dict=False)[0]
        return self.prediction(out, z).to(z.dtype)

    @abstractmethod
    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        """All that the network takes besides ``z`` and its number, by name."""

    @abstractmethod
    def conditioning(self, inputs: dict[str, Any]) -> Conditioning:
        """What `inputs` makes of a conditioning, read back."""

    def retold(self, inputs: dict[str, Any], cond: Conditioning) -> dict[str, Any]:
        """These inputs with the tokens and the pooled embedding of ``cond``, all else as it is."""
        return {**inputs, "encoder_hidden_states": cond.tokens.to(inputs["encoder_hidden_states"])}

    def text_rows(self, tokens: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length width"]:
        """What the text projections of attention read of the text encoders' rows: here these themselves."""
        return tokens

    @property
    def text_layers(self) -> tuple[str, ...]:
        """The modules that `text_rows` runs, by name."""
        return ()

    def text_length(self, inputs: dict[str, Any]) -> int:
        """How many tokens of text the network computes with, given these inputs."""
        text = inputs.get("encoder_hidden_states")
        return 0 if text is None else text.shape[1]

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
        z, timestep = given.pop(self.first), given.pop(self.told)
        return Call(self, self.unpacked(z, given), timestep, given)

    def asks_for_dict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call wants the result in diffusers' own type, and not as a tuple."""
        return self._signature.bind(self.network, *args, **kwargs).arguments.get("return_dict", True)

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
        """The inverse of `prediction`: what the network's caller expects, with the rest of the network's own output
        ``out``, where there is one of that shape, or with zeros."""
        missing = (self.network.config.out_channels or 0) - prediction.shape[1]
        if missing <= 0:
            return prediction
        rest = prediction.new_zeros(len(prediction), missing, *prediction.shape[2:])
        if out is not None and out[:, -missing:].shape == rest.shape:
            rest = out[:, -missing:]
        return torch.cat([prediction, rest], dim=1)

    def guidance(self, z: Tensor, cond: Conditioning, asked: float | None) -> Float[Tensor, "batch"]:
        """What each row is told of guidance: as ``asked`` for, else as the conditioning says, else the default."""
        told = cond.guidance if asked is None else asked
        told = self.default_guidance if told is None else told
        return torch.as_tensor(told, dtype=torch.float32, device=z.device).expand(len(z))

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(type(self.network).forward)

    def _subset(self, subset: str) -> dict[str, nn.Parameter]:
        chosen = (lambda name: True) if subset == "full" else self.subsets[subset]
        return {name: p for name, p in self.network.named_parameters() if chosen(name)}


def takes_adapter(module: nn.Module) -> bool:
    """Whether a layer can have a low-rank product beside it: linear layers, and convolutions without groups."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def foreign(tokens: Tensor, mask: Tensor | None = None, **others: Any) -> Conditioning:
    """A conditioning of which the embeddings are known, and not the words."""
    ids = torch.full(tokens.shape[:2], -1, device=tokens.device)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return replace(Conditioning(tokens, ids, seen), **others)


def attention_pairs(anatomy: Anatomy, side: Callable[[str], int]) -> list[Site]:
    """The sites of networks whose blocks have ``attn1`` (self) and ``attn2`` (cross).

    Args:
        side: the feature map's side as a function of the layer's name.
    """
    where = {"attn1": "self", "attn2": "cross"}
    named = ((n, where.get(n.rsplit(".", 1)[-1]), m) for n, m in anatomy.network.named_modules())
    return [Site(n, kind, side(n), m, anatomy.context) for n, kind, m in named if kind and isinstance(m, Attention)]


def site_projections(site: Site) -> list[Projection]:
    """The four projections of one stream."""
    named = {what: (f"to_{what}", getattr(site.module, f"to_{what}")) for what in ("q", "k", "v")}
    named["out"] = ("to_out.0", site.module.to_out[0])
    return [Projection(f"{site.name}.{n}", f"{site.kind}.{what}", m, site.resolution) for what, (n, m) in named.items()]
