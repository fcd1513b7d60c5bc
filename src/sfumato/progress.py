"""Progress bars, on stderr: what a command prints on stdout can be piped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def track(items: Sequence[T], label: str, show: bool = True) -> Iterable[T]:
    """The items, with a bar that goes away at the end if wanted."""
    if not show:
        return items
    from rich.progress import track

    return track(items, description=label, transient=True, console=console())


def console() -> Console:
    """Where bars go."""
    from rich.console import Console

    return Console(stderr=True)
