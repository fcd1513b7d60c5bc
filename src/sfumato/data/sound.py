"""Pictures of which a few cannot be read."""

from __future__ import annotations

import warnings

import numpy as np

from sfumato.errors import BadInput

from .base import Pictures

UNKNOWN, GOOD, BAD = 0, 1, 2


class Sound(Pictures):
    """Another source's pictures; the next readable row takes the place of one that cannot be read.

    Every bad row is named in a warning, once, with the count so far. Which row an index gives does not depend on what
    was read before, so runs stay reproducible; a caption or class that is asked for before its picture costs a look at
    the picture.

    Args:
        pictures: the source.
        name: what it is called in complaints.
        share: the largest share of bad rows; one must be readable.

    Raises:
        BadInput: (from reading) more rows are bad.
    """

    def __init__(self, pictures: Pictures, name: str, share: float):
        n = len(pictures)
        self.pictures, self.called, self.limit = pictures, name, min(int(share * n), n - 1)
        self.state, self.bad = bytearray(n), 0
        self.label_names, self.conditions = pictures.label_names, pictures.conditions
        self.origin, self.left_out = pictures.origin, pictures.left_out

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, index: int) -> np.ndarray:
        return self._find(index, True)[1]

    def condition(self, index: int) -> np.ndarray:
        return self.pictures.condition(self._find(index)[0])

    def caption(self, index: int) -> str:
        return self.pictures.caption(self._find(index)[0])

    def name(self, index: int) -> str:
        return self.pictures.name(self._find(index)[0])

    def label(self, index: int) -> int:
        return self.pictures.label(self._find(index)[0])

    def identity(self) -> str:
        """Of all rows, the bad ones among them: to find those every picture would have to be read."""
        return self.pictures.identity()

    def _find(self, index: int, pixels: bool = False) -> tuple[int, np.ndarray | None]:
        """The first readable row from ``index`` on, and its picture if that is wanted."""
        row = range(len(self.state))[index]
        while True:
            if self.state[row] == GOOD and not pixels:
                return row, None
            if self.state[row] != BAD:
                try:
                    picture = self.pictures.picture(row)
                    if self.conditions and self.state[row] == UNKNOWN:
                        self.pictures.condition(row)
                    self.state[row] = GOOD
                    return row, picture
                except BadInput as error:
                    self._count(row, error)
            row = (row + 1) % len(self.state)

    def _count(self, row: int, error: BadInput) -> None:
        self.state[row] = BAD
        self.bad = self.state.count(BAD)
        if self.bad > self.limit:
            raise BadInput(
                f"{error}; {self.bad} of the {len(self)} pictures of {self.called} cannot be read, and "
                f"{self.limit or 'none'} may be: remove or mend them"
            ) from error
        warnings.warn(f"{error}: skipped; {self.bad} so far, of at most {self.limit}", stacklevel=4)
