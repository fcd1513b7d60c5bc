"""Forward hooks of ours, told apart from the libraries', so that copies of a pipeline leave ours behind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakSet

from torch import nn
from torch.utils.hooks import RemovableHandle

_ours: WeakSet[Callable] = WeakSet()


def attach(module: nn.Module, hook: Callable) -> RemovableHandle:
    """Register a forward hook (a plain function, not a bound method) that does not travel with copies."""
    _ours.add(hook)
    return module.register_forward_hook(hook)


def foreign(hooks: OrderedDict) -> OrderedDict:
    """The hooks that are not ours: transformers records hidden states through some, and a copy needs them."""
    return OrderedDict((key, hook) for key, hook in hooks.items() if hook not in _ours)
