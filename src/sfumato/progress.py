"""Progress bars, on stderr: what a command prints on stdout can be piped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from sfumato.text import visible

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def alone() -> bool:
    """Whether this process speaks and writes; the others of a parallel training work in silence."""
    return os.environ.get("RANK", "0") == "0"
Out = TypeVar("Out", covariant=True)


class Counted(Protocol[Out]):
    """What can be gone through and says how much of it there is."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Out]: ...


def track(items: Counted[T], label: str, show: bool = True) -> Iterable[T]:
    """The items, with a bar that goes away at the end if wanted."""
    if not show:
        return items
    from rich.markup import escape
    from rich.progress import track

    return track(items, total=len(items), description=escape(visible(label)), transient=True, console=console())


def console() -> Console:
    """Where bars go."""
    from rich.console import Console

    return Console(stderr=True)
