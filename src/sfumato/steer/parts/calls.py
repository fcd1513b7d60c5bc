"""Calls of a pipeline's network made from other calls: of another size, with another text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.pipeline.anatomy import Call
from sfumato.pipeline.split import ENCODER_ONLY

from .propagation import same
from .resolutions import pooled


def resized(call: Call, z: Tensor, size: tuple[int, int], factors: tuple[int, ...] = ()) -> Call:
    """The call for a latent of another size, with all that depends on the size as it is for that one.

    Args:
        size: (height, width) in pixels that the network is told, where it is told any.
        factors: by which residuals of a ControlNet are averaged.
    """
    anatomy: Any = call.anatomy
    cond = call.cond
    small = cond
    if cond.size_ids is not None and cond.size_ids.shape[1] == 6:  # (original, crop, target); a refiner has others
        small = cond.replace(size_ids=cond.size_ids.new_tensor([[*size, 0, 0, *size]]).expand(len(cond), 6))
    before, after = anatomy.inputs(call.z, cond), anatomy.inputs(z, small)
    inputs = call.inputs | {name: value for name, value in after.items() if not same(value, before[name])}
    if factors:
        inputs |= {name: _pooled(inputs[name], factors) for name in ENCODER_ONLY if inputs.get(name) is not None}
    return replace(call, z=z, inputs=inputs)


def _pooled(residuals: Any, factors: tuple[int, ...]) -> Any:
    if torch.is_tensor(residuals):
        return pooled(residuals, factors)
    return type(residuals)(_pooled(x, factors) for x in residuals)
