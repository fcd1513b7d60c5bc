"""Where pictures come from: the sketch world, folders, tables, shards, all through one door."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sfumato.errors import BadInput

BAD_SHARE = 0.01
"""Share of the pictures that may be unreadable before `open_pictures` gives up, unless told otherwise."""


class Pictures(Protocol):
    """Pictures by index, with captions, classes and conditions where there are any. An index always gives the same row.

    A source inherits this class and states what it has.
    """

    label_names: tuple[str, ...] = ()
    """The names of the classes; empty when there are none."""
    conditions: bool = False
    """Whether every row has a second picture that goes with it, such as an edge map of it."""
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


def open_pictures(
    source: str,
    size: int,
    caption: str = "{caption}",
    seed: int = 0,
    count: int = 40_000,
    bad_share: float = BAD_SHARE,
) -> Pictures:
    """Pictures from ``source``.

    Args:
        source:
            "sketch": the sketch world; classes are its objects.
            "digits": scikit-learn's 1797 handwritten digits, 8x8, classes "0" to "9".
            A folder: its pictures, also in subfolders. Captions stand beside a picture or in ``metadata.jsonl`` or
            ``metadata.csv`` (see `sfumato.data.captions`); classes are the subfolders, when all pictures lie in
            subfolders; NAME.cond.png is the condition of NAME.
            Parquet files (a path, several joined by commas, or a pattern): columns ``image`` (or ``img``), ``caption``
            (or ``text``, ``prompt``, ...), ``label`` (with its names in ``name``), ``condition`` (or
            ``conditioning_image``).
            "hub:OWNER/NAME", "hub:OWNER/NAME:SPLIT" or "hub:OWNER/NAME:CONFIG:SPLIT": a data set that `datasets` loads,
            from the hub or a local folder; columns as for Parquet files.
            WebDataset shards (.tar; a path, several joined by commas, a pattern or a range as in
            "set-{000..127}.tar"): KEY.png (or another suffix), with KEY.txt, KEY.json, KEY.cls and KEY.cond.png.
        size: side in pixels; pictures are cropped to their central square, with their transparency on white.
        caption: how a row becomes a caption, e.g. "{caption}, {style} style"; names are columns, or fields of KEY.json.
        seed: of the sketch world.
        count: how many pictures of the sketch world.
        bad_share: unreadable pictures, up to this share, are named, counted and replaced by the next good one;
            0 stops at the first.

    Raises:
        BadInput: nothing is found there, or a column or caption is missing. Later, from ``picture``: too many pictures
            cannot be read.
    """
    if source == "sketch":
        from .toys import SketchPictures

        return SketchPictures(size, seed, count)
    if source == "digits":
        from .toys import DigitPictures

        return DigitPictures(size)
    from .sound import Sound

    if (found := _from_files(source, size, caption)) is not None:
        if found.left_out:
            told = ", ".join(f"{n} {reason}" for reason, n in found.left_out.items())
            warnings.warn(f"left out of {source}: {told}", stacklevel=2)
        return Sound(found, source, bad_share)
    raise BadInput(
        f"no pictures at {source!r}: give 'sketch', 'digits', a folder, a .parquet or .tar file, or hub:OWNER/NAME"
    )


def _from_files(source: str, size: int, caption: str) -> Pictures | None:
    """The source that reads files of this kind."""
    first = source.split(",")[0]
    if source.startswith("hub:"):
        from .tables import HubPictures

        return HubPictures(source.removeprefix("hub:"), size, caption)
    if first.endswith(".parquet"):
        from .tables import ParquetPictures

        return ParquetPictures(source, size, caption)
    if first.endswith(".tar"):
        from .shards import TarPictures

        return TarPictures(source, size, caption)
    if Path(source).is_dir():
        from .folders import FolderPictures

        return FolderPictures(Path(source), size)
    return None


def to_square(data: bytes | Path, size: int, name: str = "a picture") -> UInt8[np.ndarray, "size size 3"]:
    """Decode, turn upright, lay transparency on white, centre-crop to a square and resize (Lanczos, antialiased).

    Args:
        data: an encoded picture, or its file.
        size: side in pixels.
        name: what the complaint calls encoded bytes; a file is called by its path.

    Raises:
        BadInput: the picture is corrupt, of more pixels than Pillow's limit against decompression bombs, or none.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
            image = _opaque(ImageOps.exif_transpose(file))
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        name = name if isinstance(data, bytes) else str(data)
        raise BadInput(f"{name} cannot be read as a picture ({error})") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side)))


UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)
"""What decoders raise on damaged pictures."""


def _opaque(image: Image.Image) -> Image.Image:
    """The picture in colour, whatever its mode, what is transparent in it on white."""
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow's conversion would cut off at 255
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures (height, width, 3) -> float (batch, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
