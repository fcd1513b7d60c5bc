"""Progress on stderr: what a command prints on stdout can be piped. Bars at a terminal; elsewhere a line a phase."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from sfumato.text import visible

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
listener: Callable[[str, int, int], None] | None = None
"""Who is told of every step, as (label, done, total), in the place of stderr: for who shows progress elsewhere."""
Out = TypeVar("Out", covariant=True)


class Counted(Protocol[Out]):
    """What can be gone through and says how much of it there is."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Out]: ...


def alone() -> bool:
    """Whether this process speaks and writes; the others of a parallel training work in silence."""
    return os.environ.get("RANK", "0") == "0"


def track(items: Counted[T], label: str, show: bool = True) -> Iterable[T]:
    """The items, with a bar that goes away at the end if wanted."""
    return _tracked(items, label) if show else items


def _tracked(items: Counted[T], label: str) -> Iterator[T]:
    with bar(label, len(items)) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def bar(label: str, total: int, show: bool = True) -> Iterator[Callable[[], None]]:
    """A bar that goes away at the end, or nothing; gives the function that advances it by one."""
    if not show:
        yield lambda: None
        return
    if listener is not None:
        with _heard(label, total, listener) as advance:
            yield advance
        return
    shown = console()
    if not shown.is_terminal:
        with phase(label, total) as move:
            yield lambda: move(1)
        return
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(transient=True, console=shown) as progress:
        task = progress.add_task(escape(visible(label)), total=total)
        yield lambda: progress.advance(task)


@contextmanager
def _heard(label: str, total: int, tell: Callable[[str, int, int], None]) -> Iterator[Callable[[], None]]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        tell(label, done, total)

    tell(label, 0, total)
    yield advance


@contextmanager
def phase(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A line at the start and one at the end, for what no terminal shows; gives the function that counts."""
    began, done = time.monotonic(), 0

    def move(by: int) -> None:
        nonlocal done
        done += by

    say(f"{label}: 0 of {total}")
    try:
        yield move
    finally:
        say(f"{label}: {done} of {total}, {time.monotonic() - began:.0f} s")


def say(line: str) -> None:
    """A line on stderr, at once."""
    print(visible(line), file=sys.stderr, flush=True)


def console() -> Console:
    """Where bars go."""
    from rich.console import Console

    return Console(stderr=True)
