"""A pipeline lent to a method: sound when it comes in, and handed back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from sfumato.finite import require_finite as require_finite_weights

from .base import Text2Image
from .contract import Model
from .load import wrap
from .offload import stored


@contextmanager
def lent(
    pipe: DiffusionPipeline | Text2Image, controlled: bool = False, frozen: bool = True
) -> Iterator[Text2Image]:
    """`wrap` for the duration of a block: a plain diffusers pipeline, which wrapping freezes, gets its flags back.

    Args:
        controlled: as in `wrap`.
        frozen: False leaves a plain pipeline's flags alone, for who draws with it: torch multiplies by weights that
            require gradients in another way, which shows in the last bits.
    """
    bare = not isinstance(pipe, Text2Image)
    parts = [m for m in pipe.components.values() if isinstance(m, nn.Module)] if bare else []
    flags = [(x, x.requires_grad) for m in parts for x in m.parameters()]
    modes = [(m, m.training) for part in parts for m in part.modules()]

    def back() -> None:
        for x, required in flags:
            x.requires_grad_(required)
        for module, training in modes:
            module.training = training

    try:
        made = wrap(pipe, controlled=controlled)
        if not frozen:
            back()
        yield made
    finally:
        back()


def require_finite(p: Model) -> None:
    """Refuse a model some of whose weights, or of its adapters', are NaN or infinite.

    What `load` loads was looked at; this is for pipelines that came otherwise, or that were changed since.

    Raises:
        NotFinite: names the first such tensor.
    """
    for part, name, x in tensors(p):
        require_finite_weights([(name, x)], part)


def tensors(p: Model) -> Iterator[tuple[str, str, Tensor]]:
    """(part, name, tensor) of all weights of a model and of the adapters attached to it."""
    for part, module in p.parts().items():
        yield from ((part, name, x) for name, x in stored(module))
    for key, adapter in p.adapters.items():
        yield from ((f"adapter {key}", name, x) for name, x in adapter.state_dict().items())
