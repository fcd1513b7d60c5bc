"""What we hang onto other libraries' objects, told apart from theirs, so that copies leave ours behind."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar
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


M = TypeVar("M", bound=nn.Module)


def duplicate(module: M, memo: dict[int, object]) -> M:
    """`copy.deepcopy`, which would take each of a layer's dozen dictionaries of hooks apart: nearly all are empty, and
    that is most of its time."""
    held = [value for layer in module.modules() for value in vars(layer).values()]
    empty = {id(value): type(value)() for value in held if type(value) in (dict, set, OrderedDict) and not value}
    return deepcopy(module, empty | memo)


def forward_name(module: nn.Module) -> str:
    """The attribute that holds a module's own forward: accelerate, which moves weights between devices in a forward of
    its own, puts it aside."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


class Override:
    """A method of one object replaced until `remove`: ``function`` gets the original method and the call's arguments.

    It keeps the original's signature, which pipelines look at. A copy of the object has the original method again.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]):
        self.owner, self.name, self.function = owner, name, function
        self.original = getattr(owner, name)
        self.own = name in vars(owner)  # somebody else's override, which comes back on removal
        functools.update_wrapper(self, self.original, updated=())
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Callable:
        return deepcopy(self.original, memo)

    def remove(self) -> None:
        """Put the object back as it was, also if another library has moved the method to a new name meanwhile."""
        for name in [key for key, value in vars(self.owner).items() if value is self]:
            delattr(self.owner, name)
            if self.own or name != self.name:
                setattr(self.owner, name, self.original)
