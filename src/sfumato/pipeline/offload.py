"""Weights that are on the accelerator only while they compute: diffusers' own offloading, for our draws and edits too.

Written against the diffusers pipeline alone, so that it makes no difference whether we or its owner turned it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from torch import Tensor, nn

from sfumato.errors import BadInput

Offload = Literal["model", "sequential"]
"""One part of the pipeline on the accelerator at a time, or one layer."""

_EDITED = (
    "the weights of this pipeline are offloaded layer by layer, so that it can draw but not be {what}: load it without "
    'offload, or with offload="model"'
)


def accelerator(asked: torch.device | str | None = None) -> torch.device:
    """The device that offloaded weights come to while they compute.

    Raises:
        BadInput: there is none on this machine, or ``asked`` is none.
    """
    there = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    found = torch.device(there if asked is None and there else asked or "cpu")
    if found.type == "cpu":
        why = "there is none on this machine" if there is None else "the device is the CPU"
        raise BadInput(f"offloading moves weights to an accelerator while they compute, and {why}: leave offload out")
    return found


def begin(pipe: Any, how: Offload, device: torch.device) -> None:
    """Turn diffusers' offloading on.

    Raises:
        BadInput: an unknown kind.
    """
    turn_on = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}
    if how not in turn_on:
        raise BadInput(f"unknown offload {how!r}: choose from {', '.join(turn_on)}")
    getattr(pipe, turn_on[how])(device=device)


def kind(pipe: Any) -> Offload | None:
    """How a pipeline is offloaded; None where it is not (accelerate spreads models over devices by such hooks too)."""
    hooked = [m for m in pipe.components.values() if isinstance(m, nn.Module) and hasattr(m, "_hf_hook")]
    if any(x.is_meta for m in hooked for x in m.parameters()):
        return "sequential"
    return "model" if hooked and getattr(pipe, "_all_hooks", []) else None


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module computes, if its weights come there for that only; None where they stay."""
    if not hasattr(module, "_hf_hook"):
        return None
    devices = (getattr(h, "execution_device", None) for m in module.modules() for h in _hooks(m))
    return next((torch.device(device) for device in devices if device is not None), None)


def wake(module: nn.Module) -> None:
    """Bring a part's weights where it computes, for who calls some of its layers alone."""
    if hasattr(module, "_hf_hook") and not any(x.is_meta for x in module.parameters()):
        module._hf_hook.pre_forward(module)


def put_away(pipe: Any) -> None:
    """What diffusers does at the end of a call: every part that is offloaded as a whole leaves the accelerator."""
    for hook in getattr(pipe, "_all_hooks", []):
        if hasattr(hook.model, "_hf_hook"):  # not turned off since
            hook.offload()


def refuse(pipe: Any, what: str) -> None:
    """Raise `BadInput` where weights are offloaded layer by layer: nothing can be computed of them then.

    Args:
        what: would be done to the pipeline, as a participle.
    """
    if kind(pipe) == "sequential":
        raise BadInput(_EDITED.format(what=what))


def stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters by name, those that are offloaded layer by layer as they are kept."""
    for name, x in module.named_parameters():
        if x.is_meta:
            owner, _, last = name.rpartition(".")
            kept = (getattr(hook, "weights_map", None) for hook in _hooks(module.get_submodule(owner)))
            x = next((weights[last] for weights in kept if weights is not None), x)
        yield name, x


def forgotten(module: nn.Module, memo: dict[int, object]) -> None:
    """Let a deep copy of a module with ``memo`` have nothing of its offloading; `free` completes that."""
    if hasattr(module, "_hf_hook"):
        memo[id(module._hf_hook)] = ModelHook()  # theirs know the other parts, which would be copied along


def free(module: nn.Module) -> None:
    """Take a copy's offloading away."""
    if any(hasattr(m, "_hf_hook") for m in module.modules()):
        remove_hook_from_module(module, recurse=True)


def keep(pipe: Any, module: nn.Module, device: torch.device) -> None:
    """Let one part of a pipeline that is offloaded by parts stay on the device, whatever else computes."""
    own = next((hook for hook in pipe._all_hooks if hook.model is module), None)
    if own is not None:
        pipe._all_hooks.remove(own)
        for hook in pipe._all_hooks:  # the next part sends the one before it away
            if hook.hook.prev_module_hook is own:
                hook.hook.prev_module_hook = own.hook.prev_module_hook
    free(module)
    module.to(device)


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
