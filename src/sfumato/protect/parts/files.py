"""Pictures in their own mode, and the folder of protected ones, where finished pictures stay when a run is killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from sfumato.data.base import UNREADABLE
from sfumato.data.folders import pictures_in
from sfumato.errors import BadInput
from sfumato.files import sha256_of, write_json
from sfumato.foreign import read_json

MODES = ("L", "LA", "RGB", "RGBA")
"""Modes that are protected as they are: 8 bits a channel, grey or colour, with alpha or without."""
RECORD = "protect.json"
PROTECTED = "protected against diffusion models"


@dataclass(frozen=True)
class Given:
    """A picture that is to be protected: its file, and the name (with folders) of the PNG that it becomes."""

    file: Path
    name: str


def found_in(source: Path) -> list[Given]:
    """The pictures of a folder and its subfolders, or one picture.

    ``a.jpg`` becomes ``a.png``; where that would be two, ``a.jpg.png``; no two get one name.

    Raises:
        BadInput: there are none.
    """
    if source.is_file():
        return [Given(source, f"{source.stem}.png")]
    if not source.is_dir():
        raise BadInput(f"{source} is no picture and no folder of pictures: give one")
    files = pictures_in(source)
    if not files:
        raise BadInput(f"{source} holds no pictures: give a folder that does")
    names = {f: f.relative_to(source).with_suffix(".png").as_posix() for f in files}
    while True:  # a longer name may be the short one of another: then that one is made longer too
        count = Counter(n.casefold() for n in names.values())  # some systems hold A.png and a.png to be one
        longer = {f: f"{f.relative_to(source).as_posix()}.png" for f, n in names.items() if count[n.casefold()] > 1}
        if longer.items() <= names.items():
            return [Given(f, n) for f, n in names.items()]
        names |= longer


def read_picture(file: Path) -> Float[Tensor, "1 channel height width"]:
    """A picture in its own mode, upright, in [0, 1]: grey, grey with alpha, colour, or colour with alpha.

    Raises:
        BadInput: it cannot be read, or is of a mode in which small changes cannot be kept: a palette, 16 bits, black
            and white, CMYK, or several frames.
    """
    try:
        with Image.open(file) as opened:
            refuse_mode(opened, file)
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data and upright.mode in ("L", "RGB"):
                upright = upright.convert("LA" if upright.mode == "L" else "RGBA")
            array = np.asarray(upright).copy()
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file} cannot be read as a picture ({error})") from error
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def refuse_mode(opened: Image.Image, file: Path) -> None:
    """Raise `BadInput` for a picture that cannot be protected in its own mode, and say what would do."""
    depth = f"{opened.mode} {[tile[3] for tile in getattr(opened, 'tile', [])]}"
    if ";16" in depth or opened.mode in ("I", "F"):
        raise BadInput(f"{file} has more than 8 bits a channel, and models see 8: save it with 8 first")
    if getattr(opened, "n_frames", 1) > 1:
        raise BadInput(f"{file} has several frames: save the one to protect as a picture of its own")
    if opened.mode not in MODES:
        kind = {"P": "a palette", "PA": "a palette", "1": "no grey"}.get(opened.mode, f"mode {opened.mode}")
        raise BadInput(
            f"{file} has {kind}, in which small changes cannot be kept: save it as RGB (or RGBA, or grey) first"
        )


def levels(picture: Float[Tensor, "channel height width"]) -> np.ndarray:
    """A picture in [0, 1] as its file holds it: uint8, height x width, or with channels last."""
    array = (255 * picture.double()).round().byte().permute(1, 2, 0).cpu().numpy()
    return array[..., 0] if array.shape[2] == 1 else array


def claim(out: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """Begin, or go on with, a folder of protected pictures made with the settings ``told`` (JSON types); its record.

    Raises:
        BadInput: the folder holds something else, or pictures protected with other settings.
    """
    file = out / RECORD
    if not file.exists():
        if there := sorted(p.name for p in out.iterdir()):
            raise BadInput(f"{out} is not a folder of protected pictures: it holds {there[0]}; choose another")
        record: dict[str, Any] = {"settings": dict(told), "pictures": {}}
        write_json(file, record)
        return record
    record = read_json(file, advice="choose another folder")
    before = record.get("settings", {})
    if changed := sorted(k for k in {*before, *told} if before.get(k) != told.get(k)):
        words = "; ".join(f"{k}: {before.get(k)!r} there, {told.get(k)!r} here" for k in changed)
        raise BadInput(f"{out} holds pictures protected with other settings ({words[:300]}): choose another folder")
    return record


def finished(out: Path, given: Given, record: Mapping[str, Any]) -> bool:
    """Whether a picture was protected already, and neither it nor what it came from has changed since."""
    known = record["pictures"].get(given.name)
    target = out / given.name
    return bool(
        known and target.is_file() and known["given"] == sha256_of(given.file) and known["written"] == sha256_of(target)
    )
