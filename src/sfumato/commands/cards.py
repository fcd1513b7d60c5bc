"""What an optimisation step of a method needs of a card's memory, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato import catalog
from sfumato.errors import BadInput

if TYPE_CHECKING:
    from sfumato.pipeline import Text2Image
    from sfumato.pipeline.backward import Learning


@dataclass(frozen=True)
class Need:
    """Bytes of one optimisation step, by part.

    Attributes:
        learning: what it differentiates; None: nothing, of the denoising network.
        weights: of all parts of the model, once.
        trained: the copy of what is trained, in float32.
        gradients: of these.
        optimiser: two averages for each number in float32, or with 8-bit Adam two bytes.
        activations: at their peak; ``recomputed``: with checkpointing, None where the method or network cannot.
    """

    learning: Learning | None
    weights: int
    trained: int = 0
    gradients: int = 0
    optimiser: int = 0
    optimiser_8bit: int = 0
    activations: int = 0
    recomputed: int | None = None

    @property
    def plain(self) -> int:
        """In all."""
        return self.weights + self.trained + self.gradients + self.optimiser + self.activations

    @property
    def least(self) -> int:
        """In all, with checkpointing, where there is such, and 8-bit Adam."""
        last = self.activations if self.recomputed is None else self.recomputed
        return self.weights + self.trained + self.gradients + self.optimiser_8bit + last

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes), without the weights; empty where nothing is differentiated."""
        if self.learning is None or not self.learning.rows:
            return []
        told = [("trained copy", self.trained), ("gradients", self.gradients), ("optimiser", self.optimiser),
                ("optimiser, with adam8bit", self.optimiser_8bit), ("activations", self.activations)]  # fmt: skip
        if self.recomputed is not None:
            told.append(("activations, with checkpointing", self.recomputed))
        return [*told, ("one step in all", self.plain), ("one step in all, at the least", self.least)]


def made(verb: str, name: str, **settings: Any) -> Any:
    """The method with its own settings; what it needs does not depend on the word."""
    cls = catalog.get(name, verb).load()
    return cls(**({"concepts": ("a",)} if verb == "erase" else {}), **settings)


def need(pipe: Text2Image, method: Any) -> Need:
    """What a step of a configured eraser or attack needs on ``pipe``, whose weights need not be there.

    Raises:
        BadInput: it does not fit.
    """
    from sfumato.pipeline.backward import activations

    if hasattr(method, "fits") and not method.fits(pipe):
        name = type(method).__name__
        raise BadInput(f"{name} does not fit this {type(pipe.pipe).__name__}: see sfumato choose erase")
    weights = sum(p.numel() * p.element_size() for m in pipe.parts().values() for p in m.parameters())
    learning = method.learning(pipe)
    if learning is None or not learning.rows:
        return Need(learning, weights)
    trained = learning.copies * learning.numbers(pipe)
    recomputes = getattr(method, "recomputes", hasattr(method, "checkpointing"))
    recomputes &= getattr(pipe.network, "_supports_gradient_checkpointing", False)
    return Need(
        learning, weights, 4 * trained, 4 * trained * learning.gradients // learning.copies, 8 * trained, 2 * trained,
        activations(pipe, learning), activations(pipe, learning, checkpointing=True) if recomputes else None,
    )  # fmt: skip
