"""The two sets that are scored: pictures or features kept earlier, brought to one size in one way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sfumato.data.census import content_hash, sizes_of
from sfumato.data.pictures import Pictures, open_pictures
from sfumato.errors import BadInput

from .features import Features


class Source:
    """One of the sets, by what the user calls it.

    Args:
        where: what `data.pictures.open_pictures` opens, or a file of features (.safetensors).
        limit: at most this many pictures, the first ones.

    Raises:
        BadInput: a file of features that is not there or cannot be read.
    """

    def __init__(self, where: str, limit: int | None = None):
        self.where, self.limit = where, limit
        self.kept: Path | None = None
        """The file in which its features are kept, once they are."""
        self.given: Features | None = None
        if where.endswith(".safetensors"):
            if not Path(where).is_file():
                raise BadInput(f"there is no file of features {where}")
            self.given = Features.load(where)

    @cached_property
    def sizes(self) -> dict[tuple[int, int], list[str]]:
        """(width, height) -> the pictures that have it, by name; empty for features and where any size is drawn."""
        return {} if self.given is not None else sizes_of(self.where)

    def open(self, side: int) -> None:
        """Open the pictures as squares of ``side`` pixels."""
        if self.given is not None:
            self.n = len(self.given)
            return
        counted: dict[str, Any] = {"count": self.limit} if self.limit and self.where == "sketch" else {}
        self.pictures: Pictures = open_pictures(self.where, side, bad_share=0.0, **counted)
        self.n = min(len(self.pictures), self.limit or len(self.pictures))

    @cached_property
    def content(self) -> str:
        """A hash of the pictures."""
        return self.given.content if self.given is not None else content_hash(self.where, self.pictures, self.n)


def one_size(sources: Sequence[Source], side: int | None, usual: int = 64) -> tuple[int, str]:
    """Open all sources at one size; returns the side and how pictures came to it, in words.

    Args:
        side: the wanted side; by default the one that all pictures have, or ``usual`` where they have none.

    Raises:
        BadInput: pictures of several sizes, or not square, and no ``side``.
    """
    rule = f"centre square, Lanczos, to {side}x{side}"
    if side is None:
        tables = {s.where: s.sizes for s in sources if s.sizes}
        sizes = {size for table in tables.values() for size in table}
        if len(sizes) > 1 or any(w != h for w, h in sizes):
            told = "; ".join(f"{where}: {_most(table)}" for where, table in tables.items())
            raise BadInput(f"pictures are compared as squares of one size (--size), and these are others: {told}")
        side = next(iter(sizes))[0] if sizes else usual
        rule = f"{side}x{side} as they are"
    for source in sources:
        source.open(side)
    return side, rule


def _most(table: dict[tuple[int, int], list[str]]) -> str:
    """The most frequent sizes, each with a picture that has it."""
    rows = sorted(table.items(), key=lambda item: -len(item[1]))[:4]
    return ", ".join(f"{len(names)} of {w}x{h} ({names[0]})" for (w, h), names in rows)
