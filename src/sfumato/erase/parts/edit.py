"""What closed-form erasers have in common: they solve for new weights, then write them into a copy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import SfumatoError
from sfumato.files import refuse_existing
from sfumato.pipeline import Text2Image
from sfumato.pipeline.partial import open_partially, write_edited
from sfumato.plan import Plan

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

    def run_in_folder(
        self,
        model: str | Path,
        out: str | Path,
        overwrite: bool = False,
        provenance: Mapping[str, Any] | None = None,
        announce: Callable[[Plan], None] | None = None,
    ) -> dict[str, Any]:
        """Edit a folder without loading it: only the tensors concerned are read and written.

        The tensors of ``out`` are those that loading in the precision of the files, `apply` and `Text2Image.save` would
        give, bit for bit. Memory: the projections that the method edits, what it solves with, and one layer of a text
        encoder at a time. Files of weights that it does not touch are hard links to the original's.

        Args:
            model: a folder written by ``save_pretrained``, sharded or not.
            out: the new folder.
            provenance: as in `Text2Image.save`; what is told about the edit is added.
            announce: called with the plan before anything is computed.

        Returns:
            As the second of `run`, and ``component_wise``: bytes read and written, files copied and linked.

        Raises:
            BadInput: as `check`; ``model`` is no such folder.
            SfumatoError: the result is not finite.
        """
        refuse_existing(out, overwrite)
        partial = open_partially(model)
        pipe = partial.pipe
        if announce is not None and self.fits(pipe):
            memory = {"weights concerned": partial.held, "largest layer of a text encoder": partial.largest_streamed()}
            announce(Plan(f"{type(self).__name__}: {', '.join(self.concepts)}, without loading the model", memory))
        self.check(pipe)
        edit = self.solve(pipe)
        for name, x in edit.weights.items():
            if not x.isfinite().all():
                raise SfumatoError(
                    f"{type(self).__name__} ended with numbers that are not finite in {name}: nothing was erased; use "
                    "milder settings, or float32 weights"
                )
        log = {**edit.log, "preserve": list(self.kept(pipe))}
        told = {"log": log, "component_wise": {"read_bytes": partial.read_bytes, "tensors": len(edit.weights)}}
        written = write_edited(partial, edit.weights, out, overwrite, {**(provenance or {}), **told})
        return {**told, "component_wise": {**told["component_wise"], **written}}

    def erased(self, pipe: Text2Image) -> tuple[Text2Image, dict[str, Any]]:
        edit = self.solve(pipe)
        return edit.write(pipe), {**edit.log, "preserve": list(self.kept(pipe))}
