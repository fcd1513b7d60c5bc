"""Pictures in and out of attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import atomic_folder, save_png, write_json
from sfumato.pipeline.tokens import LearnedToken

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_pictures(folder: str | Path, size: int) -> Float[Tensor, "n 3 size size"]:
    """The pictures of a folder in [0, 1], sorted by name: centre-cropped to a square, Lanczos to ``size``
    pixels.

    Raises:
        BadInput: no such folder, no picture in it, or a file that is not a picture.
    """
    folder = Path(folder)
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _ENDINGS) if folder.is_dir() else []
    if not files:
        raise BadInput(f"{folder} holds no pictures: give a folder of {', '.join(_ENDINGS)} files")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as opened:
                picture = ImageOps.fit(opened.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        except OSError as error:
            raise BadInput(f"{file} is not a picture that can be read: remove or replace it") from error
        pictures.append(torch.from_numpy(np.asarray(picture).copy()))
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


def save_found(
    folder: str | Path,
    record: dict[str, Any],
    token: LearnedToken | None,
    pictures: Float[Tensor, "n 3 height width"] | None,
    overwrite: bool,
) -> Path:
    """Write ``attack.json``, ``learned_embeds.safetensors`` (of a learned word) and the pictures: all or
    nothing."""
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_json(temporary / "attack.json", record)
        if token is not None:
            token.save(temporary / "learned_embeds.safetensors")
        for i, picture in enumerate(() if pictures is None else pictures):
            about = {"concept": record["concept"], "attack": record["budget"]["name"]}
            save_png(temporary / f"{i:03d}.png", picture.permute(1, 2, 0).numpy(), about)
    return Path(folder)
