"""What a detector is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.errors import BadInput

Agreement = Callable[[Float[Tensor, "n 3 height width"], Sequence[str]], Float[Tensor, "n"]]
"""(pictures in [0, 1], the prompt of each) -> how well they match."""


@dataclass(frozen=True)
class Detection:
    """Per picture: whether the concept was seen, and a score in [0, 1] (higher = surer)."""

    present: Bool[Tensor, "n"]
    score: Float[Tensor, "n"]


class Detector(ABC):
    """Decides whether a concept is in a picture. ``threshold`` is the score from on which it counts as seen.

    A new kind is one file in this folder: a subclass with a ``key``.
    """

    key: ClassVar[str] = ""
    """What asks for it: KEY, or KEY:MODEL; empty for one that is only made in Python."""
    name: str
    hash: str
    threshold: float | str
    version: str = ""
    """Of the package that brings the weights or runs them, where it is none of those that every record names."""
    resize: str
    words: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Attribute -> all that it can be, where the detector knows a whole world; empty where it does not."""

    @classmethod
    def reads(cls, model: str) -> bool:
        """Whether a folder or hub id, named without a key, is a model for this kind.

        Raises:
            BadInput: there is no such model.
        """
        return False

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> Self:
        """One from a folder or hub id (empty: none was named), to tell ``concepts`` from each other.

        Raises:
            BadInput: it needs a model and none was named, or it cannot be read.
        """
        raise BadInput(f"a {cls.key} detector is made in Python only: give the object")

    @abstractmethod
    def check(self, concept: str) -> None:
        """Raise `BadInput`, saying what it knows, if the detector cannot look for ``concept``."""

    @abstractmethod
    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        """Look for ``concept`` in pictures with values in [0, 1]."""

    def attributes(self, concept: str) -> dict[str, str]:
        """Attribute -> word of ``words`` that ``concept`` names; empty where the detector knows no whole world."""
        return {}

    def agreement(self) -> tuple[str, Agreement] | None:
        """(name, measure) of how well pictures match their prompts, for detectors that can tell."""
        return None

    def describe(self) -> dict[str, Any]:
        """What a report's protocol says about the detector."""
        told = {"name": self.name, "hash": self.hash, "threshold": self.threshold}
        return {**told, "version": self.version} if self.version else told


def needed(model: str, key: str) -> str:
    """``model``, or `BadInput` where none was named."""
    if not model:
        raise BadInput(f"a {key} detector needs a model: {key}:FOLDER, written by save_pretrained, or a hub id")
    return model
