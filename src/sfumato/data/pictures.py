"""Where pictures come from: the sketch world, folders, tables, shards, all through one door."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .base import Pictures, to_square, to_tensor

__all__ = ["Pictures", "open_pictures", "read_pictures", "squares", "to_square", "to_tensor"]

DRAWN = ("sketch", "sketch-scenes", "digits")
"""Sources that are no files: their settings say all of them."""
BAD_SHARE = 0.01
"""Share of the pictures that may be unreadable before `open_pictures` gives up, unless told otherwise."""


def source_for(source: str, model: Any) -> str:
    """Where a model's pictures come from: ``source``, or by default, for models of the sketch world, "sketch".

    Raises:
        BadInput: nothing is named, and the model is of another world, which the sketch world's pictures say nothing of.
    """
    if not source and not getattr(model, "vocabulary", None):
        raise BadInput("only models of the sketch world have pictures by default: name some such as this model draws, "
                       "with data=FOLDER or --data FOLDER")  # fmt: skip
    return source or "sketch"


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
            "sketch": the sketch world, three pictures in four with one object; classes are its objects.
            "sketch-scenes": the same world, most pictures with two or three objects, each scene beside a twin of it.
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
        BadInput: nothing is found there, a column or caption is missing, or columns are named where there are none
            (only tables and shards have some). Later, from ``picture``: too many pictures
            cannot be read.
    """
    if caption != "{caption}" and (source in DRAWN or Path(source).is_dir()):
        raise BadInput(f"{source} has no columns for {caption!r}: leave it out, or give a .parquet or .tar file")
    if source == "sketch":
        from .toys import SketchPictures

        return SketchPictures(size, seed, count)
    if source == "sketch-scenes":
        from .toys import ScenePictures

        return ScenePictures(size, seed, count)
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
        f"no pictures at {source!r}: give 'sketch', 'sketch-scenes', 'digits', a folder, a .parquet or .tar file, or "
        "hub:OWNER/NAME"
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


def squares(files: Sequence[Path], size: int) -> Float[Tensor, "n 3 size size"]:
    """Picture files in [0, 1], cropped to their central squares."""
    return (to_tensor([to_square(file, size) for file in files]) / 2 + 0.5).clamp(0, 1)


def read_pictures(folder: Path, size: int, names: bool = True) -> tuple[Float[Tensor, "n 3 size size"], list[str]]:
    """All pictures of a folder in [0, 1], sorted by name, and the caption of each, "" where it has none.

    Args:
        names: a folder without any captions is captioned by its pictures' names.

    Raises:
        BadInput: no such folder, no picture in it, or a file that is not a picture.
    """
    from .folders import FolderPictures

    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder of pictures: give one")
    found = FolderPictures(folder, size)
    rows = range(len(found))
    return to_tensor([found.picture(i) for i in rows]) / 2 + 0.5, list(found.captions if names else found.written)
