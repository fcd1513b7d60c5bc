"""What an eraser is: a dataclass of hyper-parameters whose verb is `apply`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image
from sfumato.settings import Tuned


@dataclass(frozen=True, kw_only=True)
class Eraser(Tuned, ABC):
    """Fields that every eraser has."""

    keeps_world: ClassVar[bool] = False
    """Whether the words of the model's own vocabulary are preserved where ``preserve`` is None."""

    concepts: tuple[str, ...]
    """What to erase, each a word or phrase as a prompt would say it."""
    anchors: tuple[str, ...] = ()
    """What each concept should turn into: none (the method's default), one for all, or one per concept."""
    preserve: tuple[str, ...] | None = None
    """Prompts whose pictures must not change. By default closed-form erasers preserve all other words of a model that
    says which words it knows, as the embedded one does, and the others none."""
    seed: int = 0
    """Seed of all randomness in the edit."""

    def __post_init__(self) -> None:
        for name in ("concepts", "anchors", "preserve"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not self.concepts or any(not c.strip() for c in self.concepts):
            raise BadInput("name at least one concept to erase, for example concepts=['star']")
        if twice := [c for i, c in enumerate(self.concepts) if c in self.concepts[:i]]:
            raise BadInput(f"{twice[0]!r} is named twice: name every concept once")
        if len(self.anchors) not in (0, 1, len(self.concepts)):
            raise BadInput(
                "give no anchor, one anchor for all, or one per concept: "
                f"got {len(self.anchors)} for {len(self.concepts)}"
            )
        kept = {p.strip().lower() for p in self.preserve or ()}
        if clash := [c for c in self.concepts if c.strip().lower() in kept]:
            raise BadInput(f"{clash[0]!r} is both erased and preserved: name it in one of the two only")

    def anchor_for(self, index: int, default: str) -> str:
        """The anchor of concept number ``index``, or ``default`` when none was given."""
        return default if not self.anchors else self.anchors[index if len(self.anchors) > 1 else 0]

    def kept(self, pipe: Text2Image) -> tuple[str, ...]:
        """The prompts that are preserved on ``pipe``: ``preserve``, or what follows from the model where it is None."""
        if self.preserve is not None or not self.keeps_world:
            return self.preserve or ()
        named = {word for concept in self.concepts for word in concept.lower().split()}
        return tuple(w for words in pipe.vocabulary.values() for w in words if w not in named)

    @abstractmethod
    def apply(self, pipe: Text2Image) -> Text2Image:
        """A new pipeline without the concepts; the weights of ``pipe`` are not changed.

        A plain diffusers pipeline will do too: implementations pass it through `sfumato.pipeline.wrap`, which
        freezes its weights.
        """

    def run(self, pipe: Text2Image) -> tuple[Text2Image, dict[str, Any]]:
        """`apply`, and what the method has to say about how it went, for the record (JSON types)."""
        return self.apply(pipe), {}
