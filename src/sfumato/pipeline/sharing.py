"""Copies of a pipeline that share the weights nobody trains."""

from __future__ import annotations

import copy as copying
import inspect
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from sfumato.errors import BadInput

from . import offload
from .anatomy.explicit import ExplicitAttention
from .hooks import duplicate, foreign
from .organs import Organs
from .tokens import without_learned

P = TypeVar("P", bound=Organs)


def copy(p: P, own: str | Iterable[str] | None) -> P:
    """See `Text2Image.copy`."""
    with without_learned(p):
        return _copy(p, own)


def _copy(p: P, own: str | Iterable[str] | None) -> P:
    offload.refuse(p.pipe, "copied or edited")
    owned = _owned(p, own)
    how = offload.kind(p.pipe)
    parts = {name: _copy_module(part, name, owned, how is not None) for name, part in p.parts().items()}
    scheduler = copying.deepcopy(p.pipe.scheduler)
    components = {**p.pipe.components, **parts, "scheduler": scheduler}
    accepted = inspect.signature(type(p.pipe).__init__).parameters
    settings = {k: v for k, v in p.pipe.config.items() if k in accepted and k not in components}
    pipe = type(p.pipe)(**components, **settings)
    # What users set on a pipeline without its configuration knowing: the size of Flux's pictures is such an attribute.
    vars(pipe).update({k: v for k, v in vars(p.pipe).items() if isinstance(v, (bool, int, float, str)) and k[0] != "_"})
    made = type(p)(pipe, p.defaults)
    # Pipelines correct settings of the scheduler that they are given (steps_offset); a copy must draw the same.
    made.pipe.scheduler = copying.deepcopy(p.pipe.scheduler)
    made.origin = p.origin
    if how is not None:
        _offload(made, how, p.device, owned)
    # The constructor froze everything; what the copy owns is there to be trained.
    for name, part in made.parts().items():
        for key, parameter in part.named_parameters():
            parameter.requires_grad_(f"{name}.{key}" in owned)
    return made


def _offload(made: Organs, how: offload.Offload, device: torch.device, owned: set[str]) -> None:
    """A copy is offloaded like its original; but what is trained stays where its gradients are."""
    offload.begin(made.pipe, how, device)
    if any(name.startswith(f"{made.anatomy.component}.") for name in owned):
        offload.keep(made.pipe, made.network, device)


def _owned(p: Organs, own: str | Iterable[str] | None) -> set[str]:
    """Full names ("unet. ...", "text_encoder. ...") of the parameters that the copy is to own."""
    if own is None:
        return set()
    names = {f"{part}.{key}" for part, m in p.parts().items() for key, _ in m.named_parameters()}
    if own == "all":
        return names
    network = next(k for k, m in p.parts().items() if m is p.network)
    wanted = p.parameters(own) if isinstance(own, str) else own
    full = {name if name in names else f"{network}.{name}" for name in wanted}
    if unknown := sorted(full - names):
        raise BadInput(f"no parameter named {unknown[0].removeprefix(network + '.')!r} in this pipeline")
    return full


def _copy_module(module: nn.Module, prefix: str, owned: set[str], offloaded: bool) -> nn.Module:
    """A deep copy whose parameters are new objects over the old storage; the owned ones are cloned."""
    memo: dict[int, object] = {}
    for name, parameter in module.named_parameters():
        data = parameter.detach()
        data = data.clone() if f"{prefix}.{name}" in owned else data
        memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer
    for layer in module.modules():
        if offloaded:
            offload.forgotten(layer, memo)
        # Adapters, taps and attention edits belong to the original: copied, they would go on acting on its
        # behalf.
        memo[id(layer._forward_hooks)] = foreign(layer._forward_hooks)
        processor = getattr(layer, "processor", None)
        if isinstance(processor, ExplicitAttention):
            memo[id(processor)] = processor.original
    made = duplicate(module, memo)
    if offloaded:
        offload.free(made)
    return made
