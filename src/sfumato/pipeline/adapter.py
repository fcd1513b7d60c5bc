"""Low-rank adapters as forward hooks: attached, scaled per picture, summed, merged, exported as LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.files import tensors_sha256

from . import lora
from .anatomy import Anatomy
from .anatomy.base import takes_adapter
from .conditioning import Conditioning
from .hooks import attach
from .low_rank import check_style
from .organs import Organs

P = TypeVar("P", bound=Organs)
Scale = float | Float[Tensor, "rows"]


class Adapter:
    """A sum of low-rank products beside some layers of a network: y = W x + b + scale (alpha / rank) U (V x).

    V (down) starts Kaiming-uniform with a = sqrt(5), that is uniform within 1 / sqrt(fan in), and U (up) at
    zero, so that a fresh adapter changes nothing, bit for bit. On a convolution V is one with the layer's
    kernel, stride and padding to ``rank`` channels, and U is 1x1. Several adapters on a layer add up as a sum
    of products.

    Attributes:
        scale: how strongly it acts: one number, or one per row of the network's batch. A tensor with n
            entries also serves a batch of k n rows, entry i for rows i, n + i, ...: both halves of a guided
            batch.
        gate: None, or a function from the conditioning of the pictures being sampled to one scale for each;
            `Text2Image.draw` and `trajectory` set ``scale`` by it, the same for both halves of guidance.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        rank: int = 1,
        alpha: float = 1.0,
        targets: str | Sequence[str] = "transformer",
        generator: torch.Generator | None = None,
        owner: Organs | None = None,
    ):
        if rank < 1:
            raise BadInput(f"the rank of an adapter must be at least 1, got {rank}")
        self.rank, self.alpha, self.targets = rank, float(alpha), targets
        self.anatomy, self.layers = anatomy, _targets(anatomy, targets, owner)
        self.gate: Callable[[Conditioning], Float[Tensor, "rows"]] | None = None
        self._owner = owner
        self.scale = 1.0
        where = None if owner is None else owner.device  # offloaded weights are elsewhere
        self.down = {n: _parameter(_down(m, rank, generator), m, where) for n, m in self.layers.items()}
        self.up = {n: _parameter(torch.zeros(_widths(m)[1], rank), m, where) for n, m in self.layers.items()}
        self._handles = [attach(m, self._hook(n)) for n, m in self.layers.items()]

    @property
    def scale(self) -> Scale:
        return self._scale

    @scale.setter
    def scale(self, value: Scale) -> None:
        if torch.is_tensor(value) and value.ndim > 1:
            raise ValueError(f"a scale is a number or one per row, not of shape {tuple(value.shape)}")
        self._scale = value
        # Decided here, once, because looking at a tensor in every layer would stall a GPU.
        self._active = bool((value != 0).any()) if torch.is_tensor(value) else value != 0

    def parameters(self) -> list[nn.Parameter]:
        """The factors, for an optimiser."""
        return [*self.down.values(), *self.up.values()]

    def state_dict(self) -> dict[str, Tensor]:
        """``<layer>.down`` (rank, in[, k, k]) and ``<layer>.up`` (out, rank) by layer, detached."""
        return {f"{n}.{w}": getattr(self, w)[n].detach() for n in self.layers for w in ("down", "up")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy factors in; the names and shapes must be exactly this adapter's.

        Raises:
            BadInput: a missing or unused name, or a shape that differs.
        """
        mine = self.state_dict()
        if odd := sorted(mine.keys() ^ state.keys()):
            what = "missing" if odd[0] in mine else "unused"
            raise BadInput(f"the adapter does not fit this network: {odd[0]} is {what}")
        for name, x in state.items():
            if x.shape != mine[name].shape:
                raise BadInput(
                    f"the adapter does not fit: {name} is {tuple(x.shape)}, not {tuple(mine[name].shape)}"
                )
            mine[name].copy_(x)  # a view of the parameter

    def describe(self) -> dict[str, Any]:
        """What tells it from others, for records (JSON types)."""
        told = {"rank": self.rank, "alpha": self.alpha, "sha256": tensors_sha256(self.state_dict())}
        return told if torch.is_tensor(self.scale) or self.scale == 1 else {**told, "strength": self.scale}

    def remove(self) -> None:
        """Detach from the network, which is then exactly as before. Does nothing the second time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._owner is not None:
            kept = {k: a for k, a in self._owner.adapters.items() if a is not self}
            self._owner.adapters = kept

    def delta(self, layer: str, scale: float = 1.0) -> Float[Tensor, "out in ..."]:
        """scale (alpha / rank) U V in the shape of the layer's weight, in float64."""
        down, up = self.down[layer].detach().double(), self.up[layer].detach().double()
        return scale * self.alpha / self.rank * (up @ down.flatten(1)).view(-1, *down.shape[1:])

    def strength(self, key: str) -> float:
        """The one number by which weights can stand for it: its ``scale``, or 1 where a gate decides.

        Raises:
            BadInput: there is none; ``key`` is what it is called then.
        """
        if self.gate is not None:
            return 1.0
        if torch.is_tensor(self.scale) and self.scale.ndim:
            raise BadInput(f"adapter {key!r} has one scale per picture: set its scale to one number before merging")
        return float(self.scale)

    def merge(self, scale: float = 1.0) -> Organs:
        """A new pipeline, without adapters, with ``scale`` times this one added into weights of its own."""
        made = self._owner.copy({f"{name}.weight" for name in self.layers})
        self.add_to(made, scale)
        return made

    @torch.no_grad()
    def add_to(self, pipe: Organs, scale: float) -> None:
        """Add ``scale`` times this adapter to the weights of a pipeline with the same layers, in place."""
        for name in self.layers:
            part, layer = lora.split(name, self.anatomy.component)
            module = pipe.network if part == self.anatomy.component else pipe.parts()[part]
            weight = module.get_submodule(layer).weight
            # With weights offloaded the factors are on the device that they come to.
            weight.copy_(weight.double() + self.delta(name, scale).to(weight.device))

    def save_lora(
        self,
        path,
        style: str = "diffusers",
        scale: float = 1.0,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a LoRA file of fixed strength ``scale``; see `sfumato.pipeline.lora.save`.

        Raises:
            BadInput: unknown style, or "webui" for a family in which no other tool would read it; the file exists.
        """
        if style == "webui" and self._owner is not None:
            check_style(self._owner, "kohya")
        products = {n: lora.Product(self.down[n].detach(), self.up[n].detach(), self.alpha) for n in self.layers}
        lora.save(products, self.anatomy.component, path, style, scale, metadata or {}, overwrite)

    def _hook(self, name: str) -> Callable:
        layer, down, up = self.layers[name], self.down[name], self.up[name]
        factor = self.alpha / self.rank

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._active:
                return None
            x = args[0].to(down.dtype)
            if isinstance(layer, nn.Conv2d):
                low = F.conv2d(x, down, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
                product = F.conv2d(low, up[:, :, None, None])
            else:
                product = F.linear(F.linear(x, down), up)
            return (output + self._rows(product) * factor * product).to(output.dtype)

        return add

    def _rows(self, like: Tensor) -> Scale:
        scale: Any = self._scale
        if not torch.is_tensor(scale) or scale.ndim == 0:
            return scale
        if len(like) % len(scale):
            raise ValueError(f"{len(scale)} adapter scales do not fit a network batch of {len(like)} rows")
        tiled = scale.to(like).repeat(len(like) // len(scale))
        return tiled.view(-1, *[1] * (like.ndim - 1))


def merged(p: P) -> P:
    """See `Text2Image.merged`.

    Raises:
        BadInput: an adapter's scale differs from row to row.
    """
    made = p.copy({f"{name}.weight" for a in p.adapters.values() for name in a.layers})
    for key, a in p.adapters.items():
        a.add_to(made, a.strength(key))
    return made


def refuse_adapters(pipe: Organs) -> None:
    """Raise `BadInput` if adapters act in ``pipe``: what is trained here would be trained without them."""
    if pipe.adapters:
        names = ", ".join(pipe.adapters)
        raise BadInput(f"adapters are attached to this pipeline ({names}): merge or remove them first")


def _targets(
    anatomy: Anatomy, targets: str | Sequence[str], owner: Organs | None
) -> dict[str, nn.Linear | nn.Conv2d]:
    """The network's layers; and those of text encoders, which are named in full ("text_encoder. ...")."""
    asked = [targets] if isinstance(targets, str) else list(targets)
    own = [t for t in asked if lora.split(t, anatomy.component)[0] == anatomy.component]
    made = anatomy.targets(own if len(own) < len(asked) else targets) if own or not asked else {}
    parts = {} if owner is None else owner.parts()
    for name in asked:
        part, layer = lora.split(name, anatomy.component)
        if part == anatomy.component:
            continue
        found = dict(parts[part].named_modules()).get(layer) if part in parts else None
        if found is None or not takes_adapter(found):
            raise BadInput(f"unknown adapter target {name!r}: this pipeline has no such layer")
        made[name] = found
    return made


def _widths(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    return layer.weight.shape[1], layer.weight.shape[0]


def _down(layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator | None) -> Tensor:
    shape = (rank, *layer.weight.shape[1:])
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _parameter(x: Tensor, layer: nn.Module, where: torch.device | None) -> nn.Parameter:
    # Factors train in float32 even beside half-precision weights: their updates would be rounded away.
    dtype = layer.weight.dtype if layer.weight.dtype == torch.float64 else torch.float32
    return nn.Parameter(x.to(where or layer.weight.device, dtype))
