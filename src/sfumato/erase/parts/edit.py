"""What closed-form erasers have in common: they solve for new weights, then write them into a copy."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.pipeline import Text2Image

from ..base import Eraser


@dataclass(frozen=True)
class Edit:
    """New values for some of a network's parameters, and how they were found.

    Attributes:
        weights: by parameter name in the network, e.g. ``mid_block. ... .attn2.to_k.weight``.
        log: numbers for a report (JSON types): condition numbers, residuals, what was kept.
        embeddings: token embeddings found on the way, to be rendered or studied; None where a method finds none.
    """

    weights: dict[str, Float[Tensor, "out dim"]]
    log: dict[str, Any] = field(default_factory=dict)
    embeddings: Float[Tensor, "round concept length dim"] | None = None

    def write(self, pipe: Text2Image) -> Text2Image:
        """A copy of ``pipe`` that owns these weights, frozen like any pipeline, and shares all others."""
        edited = pipe.copy(own=self.weights)
        parameters = dict(edited.network.named_parameters())
        with torch.no_grad():
            for name, value in self.weights.items():
                parameters[name].copy_(value)
                parameters[name].requires_grad_(False)
        return edited


@dataclass(frozen=True, kw_only=True)
class ClosedForm(Eraser):
    """An eraser that solves for the edited weights: no images, no gradients, no randomness (``seed`` is not used).

    Adapters stay attached to the result. Those of fixed strength count as part of the weights that are edited; those
    whose strength depends on the prompt (membranes with transport) are left out of the problem and act beside it.
    """

    needs: ClassVar[tuple[str, ...]] = ("cross.k", "cross.v")
    keeps_adapters: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    # Only these: the others weigh each preserved prompt against the concept, which so many would outweigh.
    keeps_world: ClassVar[bool] = True

    @abstractmethod
    def solve(self, pipe: Text2Image) -> Edit:
        """The edit and its log; ``pipe`` is only read."""

    def erased(self, pipe: Text2Image) -> tuple[Text2Image, dict[str, Any]]:
        edit = self.solve(pipe)
        return edit.write(pipe), {**edit.log, "preserve": list(self.kept(pipe))}
