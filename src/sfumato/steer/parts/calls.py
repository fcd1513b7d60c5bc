"""Calls of a pipeline's network made from other calls: of another size, with another text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.pipeline import Conditioning
from sfumato.pipeline.anatomy import Call
from sfumato.pipeline.split import ENCODER_ONLY

from .propagation import same
from .resolutions import pooled


def resized(call: Call, z: Tensor, size: tuple[int, int], factors: tuple[int, ...] = ()) -> Call:
    """The call for a latent of another size, with all that depends on the size as it is for that one.

    Args:
        size: (height, width) in pixels that the network is told, where it is told any.
        factors: by which it is smaller, and by which residuals of a ControlNet are averaged; none of the same picture.
    """
    cond = call.cond
    small = cond
    if cond.size_ids is not None and cond.size_ids.shape[1] == 6:  # (original, crop, target); a refiner has others
        small = cond.replace(size_ids=cond.size_ids.new_tensor([[*size, 0, 0, *size]]).expand(len(cond), 6))
    inputs = _changed(call, z, cond, small)
    larger = call.larger
    if factors:
        inputs |= {name: _pooled(inputs[name], factors) for name in ENCODER_ONLY if inputs.get(name) is not None}
        larger = call.timestep if larger is None else larger
    return replace(call, z=z, inputs=inputs, larger=larger)


def retold(call: Call, conds: Sequence[Conditioning], weights: Sequence[float]) -> Call:
    """The call with a mixture of other texts in its conditional rows; where guidance is unknown, in all rows.

    Args:
        conds: one row each.
        weights: of each, at most 1 together; what is missing is the weight of the call's own text.
    """
    cond = call.cond
    length = max(c.ids.shape[1] for c in (cond, *conds))
    old, own = cond.padded(length), 1 - sum(weights)
    others = [c.padded(length).map(lambda x: x.to(cond.tokens.device)) for c in conds]
    rows = torch.ones(len(cond), dtype=torch.bool) if call.rows is None else call.rows
    rows = rows.to(old.tokens.device)
    parts = [(own, old)] if abs(own) > 1e-12 else []
    parts += [(w, c) for w, c in zip(weights, others, strict=True) if w]

    def mixed(name: str) -> Tensor | None:
        before = getattr(old, name)
        if before is None:
            return None
        chosen = rows.view(-1, *[1] * (before.ndim - 1))
        values = [(w, getattr(c, name)) for w, c in parts]
        if before.dtype == torch.bool:
            new = torch.stack([v.expand_as(before) for _, v in values]).any(0)
        else:
            new = values[0][1] if len(values) == 1 else sum(w * v for w, v in values)
        return torch.where(chosen, new.to(before), before)

    text = old.replace(tokens=mixed("tokens"), mask=mixed("mask"), pooled=mixed("pooled"))
    return replace(call, inputs=_changed(call, call.z, cond, text))


def _changed(call: Call, z: Tensor, before: Conditioning, after: Conditioning) -> dict[str, Any]:
    """The call's inputs, with all as it is for ``after`` and ``z`` that is not as for ``before``."""
    anatomy: Any = call.anatomy
    was, now = anatomy.inputs(call.z, before), anatomy.inputs(z, after)
    inputs = dict(call.inputs)
    for name, value in now.items():
        if not same(value, was[name]):  # what others have put beside it, such as pictures of an IP-Adapter, stays
            beside = inputs.get(name) if isinstance(value, dict) else None
            inputs[name] = {**beside, **value} if isinstance(beside, dict) else value
    return inputs


def _pooled(residuals: Any, factors: tuple[int, ...]) -> Any:
    if torch.is_tensor(residuals):
        return pooled(residuals, factors)
    return type(residuals)(_pooled(x, factors) for x in residuals)
