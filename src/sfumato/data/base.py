"""What every source of pictures has, and how a file becomes a square of pixels."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sfumato.errors import BadInput


def told_apart(n: int, rows: Any) -> str:
    """What tells ``n`` rows from others: how many they are, and a SHA-256 over ``rows``, plain values that say them."""
    return f"{n:,} with SHA-256 {hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"


class Pictures(Protocol):
    """Pictures by index, with captions, classes and conditions where there are any. An index always gives the same row.

    A source inherits this class and states what it has.
    """

    label_names: tuple[str, ...] = ()
    """The names of the classes; empty when there are none."""
    conditions: bool = False
    """Whether every row has a second picture that goes with it, such as an edge map of it."""
    group: int = 1
    """How many rows next to one another belong together, such as a scene and its twin: a batch holds all or none."""
    origin: str = ""
    """Where the captions come from, with counts, in words."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """What looked like a picture and is none of them: how many, by reason."""

    def __len__(self) -> int: ...

    def caption(self, index: int) -> str:
        """The text of picture ``index``; "" when it has none."""
        return ""

    def name(self, index: int) -> str:
        """What picture ``index`` is called, without its suffix; "" where rows have no names."""
        return ""

    def label(self, index: int) -> int:
        """The class of picture ``index``, a place in ``label_names``; 0 when there are no classes."""
        return 0

    def picture(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels of picture ``index``, square, of the size that was asked for."""
        ...

    def condition(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """The picture that goes with picture ``index``, prepared like it; only where ``conditions`` is true."""
        raise BadInput("these pictures come without second pictures to condition on")

    def identity(self) -> str:
        """What tells these rows from others: how many they are, and a SHA-256 over their names, captions and classes,
        and what the classes are called.

        No picture is looked at.
        """
        hasher = hashlib.sha256(json.dumps(self.label_names).encode() if self.label_names else b"")
        for i in range(len(self)):
            try:
                caption = self.caption(i)
            except BadInput:  # of a row that will be passed over
                caption = ""
            hasher.update(json.dumps([self.name(i), caption, self.label(i)]).encode() + b"\n")
        return f"{len(self):,} with SHA-256 {hasher.hexdigest()}"


class Rows(Pictures):
    """Some rows of other pictures, in an order of one's own; no more than their pixels."""

    def __init__(self, pictures: Pictures, rows: Sequence[int]):
        self.pictures, self.rows = pictures, rows

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> str:
        """By which rows they are, and those of all."""
        return f"{told_apart(len(self), list(self.rows))} of {self.pictures.identity()}"

    def picture(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        return self.pictures.picture(self.rows[index])


def to_square(data: bytes | Path, size: int, name: str = "a picture") -> UInt8[np.ndarray, "size size 3"]:
    """Decode, turn upright, lay transparency on white, centre-crop to a square and resize (Lanczos, antialiased).

    Args:
        data: an encoded picture, or its file.
        size: side in pixels.
        name: what the complaint calls encoded bytes; a file is called by its path.

    Raises:
        BadInput: the picture is corrupt, of more pixels than Pillow's limit against decompression bombs, or none.
    """
    return np.asarray(squared(to_image(data, name), size))


def squared(image: Image.Image, size: int) -> Image.Image:
    """The middle of a picture, cut to a square and resized (Lanczos, antialiased)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def to_image(data: bytes | Path | UInt8[np.ndarray, "height width 3"], name: str = "a picture") -> Image.Image:
    """A picture in colour and of its own size: decoded, turned upright, what is transparent on white.

    Args:
        data, name: as for `to_square`; or 8-bit pixels.

    Raises:
        BadInput: as `to_square`.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3:
            raise BadInput(f"{name}: pixels are 8-bit numbers (height, width, 3), not {data.dtype} {data.shape}")
        return Image.fromarray(data)
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
            if file.mode == "F" or (file.mode == "I" and file.format == "TIFF"):  # which have no white of their own
                raise ValueError("more than 16 bits a channel, which have no fixed white: save it with 8 or 16")
            return _opaque(ImageOps.exif_transpose(file))
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        name = name if isinstance(data, bytes) else str(data)
        raise BadInput(f"{name} cannot be read as a picture ({error})") from error


UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)
"""What decoders raise on damaged pictures."""


def _opaque(image: Image.Image) -> Image.Image:
    """The picture in colour, whatever its mode, what is transparent in it on white."""
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow's conversion would cut off at 255
        levels, clear = np.asarray(image), image.info.get("transparency")
        grey = (levels.astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey if clear is None else np.where(levels == clear, np.uint8(255), grey))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures (height, width, 3) -> float (batch, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
