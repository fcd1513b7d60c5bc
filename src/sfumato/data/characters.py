"""A text file as tokens: its characters, in windows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sfumato.errors import BadInput

from .base import told_apart

MOST = 1024
"""Different characters that a text may have."""


def text_of(file: str | Path) -> str:
    """The whole of a text file in UTF-8, without the mark that some editors put before it.

    Raises:
        BadInput: there is none.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise BadInput(f"there is no text at {str(file)!r}: give a text file in UTF-8")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text in UTF-8: convert it first") from error


class Characters:
    """The text of a file in windows of ``length``, one from every position; the alphabet is that of the file.

    Attributes:
        symbols: the different characters, sorted.
        text: their numbers, all in a row.
        label_names: none.

    Raises:
        BadInput: no text file in UTF-8, one that is shorter than a window, more different characters than a model of
            characters can have.
    """

    label_names: tuple[str, ...] = ()

    def __init__(self, file: str | Path, length: int):
        text = text_of(file)
        self.symbols, self.length = "".join(sorted(set(text))), length
        if len(text) < length or len(self.symbols) < 2:
            raise BadInput(f"{file} has {len(text):,} characters, {len(self.symbols)} different: give more text")
        if len(self.symbols) > MOST:
            raise BadInput(f"{file} has {len(self.symbols):,} different characters: this is for at most {MOST:,}")
        number = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.text = torch.tensor([number[symbol] for symbol in text])

    def __len__(self) -> int:
        return len(self.text) - self.length + 1

    def identity(self) -> str:
        """By the text itself."""
        return told_apart(len(self), [self.symbols, self.text.tolist()])

    def windows(self, rows: Sequence[int]) -> Int[Tensor, "n length"]:
        """The windows that begin at these positions."""
        return torch.stack([self.text[row : row + self.length] for row in rows])
