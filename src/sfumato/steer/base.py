"""What a patch is: a dataclass of settings whose verb is `patch`, a context manager."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from torch import nn

from sfumato import catalog
from sfumato.errors import BadInput
from sfumato.pipeline import Model, Text2Image
from sfumato.pipeline.lent import lent
from sfumato.pipeline.steering import Place, patched
from sfumato.settings import Tuned


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What a method says of a model without changing anything: ``sfumato steer METHOD --analyse`` writes it.

    Attributes:
        axis: what the panels have on their horizontal axis, which runs from noise to picture.
        panels: title -> name of a curve -> its points, (places on the axis, values).
        tables: name -> rows, each a mapping from the column's name.
        notes: sentences for who reads it.
    """

    axis: str
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Patch(Tuned, ABC):
    """A change of a live pipeline that lasts for a block: ``with SomePatch().patch(pipe): pipe(...)``.

    It acts on ``Text2Image.draw`` and on diffusers' own pipeline call alike, and changes one of four places: the
    conditioning, the attention, the features or the prediction. Patches of different classes nest; they act in that
    order of places, and within a place in the order of entering. When the block is left, by an exception too, the
    pipeline is exactly what it was. Weights are never changed, a copy made inside the block is unpatched, and saving
    there is refused.

    A subclass says what it does in `acting`, and in its class attributes what the tests that all patches share need.
    """

    NEUTRAL: ClassVar[Mapping[str, Any]]
    """Settings under which it changes nothing, bit for bit."""
    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    """Settings to try it with, where the defaults do not do."""

    place: ClassVar[Place]
    """What is changed."""

    @contextmanager
    def patch(self, pipe: Text2Image | DiffusionPipeline) -> Iterator[dict[str, Any]]:
        """Patch a pipeline, or a plain diffusers one, for a block; gives what the patch has to say so far (JSON types).

        diffusers' pipelines with a ControlNet will do too.

        Raises:
            BadInput: on entering: the patch does not fit this pipeline, or one of its class acts on it already.
        """
        found = [getattr(pipe, name, None) for name in ("network", "unet", "transformer")]
        network = next((n for n in found if n is not None), None)
        if not self.fits(network):
            raise BadInput(
                f"{type(self).__name__} does not fit the {type(getattr(pipe, 'pipe', pipe)).__name__}, whose network "
                f"is a {type(network).__name__}: {fitting(network)}"
            )
        with lent(pipe, controlled=True, frozen=False) as wrapped, patched(wrapped, self) as p, self.acting(p) as told:
            yield told

    def analyse(
        self, model: Model, asked: Sequence[Any] | None, seeds: Sequence[int], sampling_steps: int
    ) -> Analysis:
        """What the method says of a model; a run of what is ``asked`` for, one thing a seed, is looked at too.

        Raises:
            BadInput: the method has nothing to say.
        """
        raise BadInput(f"{type(self).__name__} analyses nothing: leave --analyse out to draw with it")

    @classmethod
    def fits(cls, network: nn.Module | None) -> bool:
        """Whether it can act on this network."""
        return network is not None

    @abstractmethod
    def acting(self, p: Text2Image) -> AbstractContextManager[dict[str, Any]]:
        """The change itself, as a context manager that gives a dictionary, in which it may note what it has done."""


def fitting(network: nn.Module | None) -> str:
    """Which patches fit a network, in words."""
    names = [m.name for m in catalog.methods("steer") if m.load().fits(network)]
    return f"patches that fit it are {', '.join(names)}" if names else "no patch of this package fits it"
