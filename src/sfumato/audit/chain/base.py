"""What a link of a chain is: something that happens to a model, and what it leaves."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from sfumato.pipeline import Text2Image
from sfumato.steer.base import Patch

SAID = (str, int, float, Path, tuple)
"""Settings that fit into a title."""


@dataclass(frozen=True)
class Chained:
    """What a model has become.

    Attributes:
        pipe: the pipeline.
        patches: that act while it draws, in the order of entering; they outlast what later links do to the weights.
        sampling: settings of `Text2Image.draw` other than the audit's.
        said: what the last link has to say of what it did, beyond its name.
    """

    pipe: Text2Image
    patches: tuple[Patch, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    said: str = ""

    @contextmanager
    def drawing(self) -> Iterator[Text2Image]:
        """The pipeline with its patches.

        Raises:
            BadInput: one does not fit it, or acts on it already.
        """
        with ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch.patch(self.pipe))
            yield self.pipe

    @property
    def whole(self) -> Text2Image:
        """The pipeline with its adapters added to the weights, each at its scale, those with a gate at strength 1: what
        trains, merges or copies weights takes no adapters."""
        return self.pipe.merged() if self.pipe.adapters else self.pipe


@dataclass(frozen=True)
class Given:
    """What a link has at hand.

    Attributes:
        original: the model before the edit.
        concepts: what was erased.
        prompts: that ask for none of it.
        folder: where what takes long may keep its state; killed, the same chain goes on. None: in memory only.
        progress: show bars.
    """

    original: Text2Image
    concepts: Sequence[str] = ()
    prompts: Sequence[str] = ()
    folder: Path | None = None
    progress: bool = False


class Link(ABC):
    """One thing that happens to a model after it was edited."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is called in a report."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What tells it from others of its title."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} if is_dataclass(self) else {}

    def check(self, given: Given, before: Sequence[Link]) -> None:  # noqa: B027, most have nothing to say
        """Refuse, before anything is drawn, what can be seen not to be possible.

        Args:
            before: the links before it.

        Raises:
            BadInput: it cannot be.
        """

    @abstractmethod
    def act(self, chained: Chained, given: Given) -> Chained:
        """The model afterwards. What it is given is left as it was.

        Raises:
            BadInput: it cannot be done to this model.
        """


def titles(links: Sequence[Link]) -> list[str]:
    """What the links of a chain are called, no two alike: those that share a title are told apart by the settings in
    which they differ, and where they differ in none by their turn."""
    plain, turns, found = [link.title for link in links], Counter[str](), []
    for link, title in zip(links, plain, strict=True):
        twins = [other.settings for other, theirs in zip(links, plain, strict=True) if theirs == title]
        apart = {name: value for name, value in link.settings.items() if any(t.get(name) != value for t in twins)}
        said = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value
        more = [f"{name} {said(value)}" for name, value in apart.items() if isinstance(value, SAID)]
        told = ", ".join([title, *more])
        turns[told] += 1
        found.append(f"{told} ({turns[told]})" if turns[told] > 1 else told)
    return found
