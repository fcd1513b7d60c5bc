"""Pictures in and out of attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.data.folders import FolderPictures
from sfumato.data.pictures import to_tensor
from sfumato.errors import BadInput
from sfumato.files import atomic_folder, save_png, write_json
from sfumato.pipeline.tokens import LearnedToken


def read_pictures(folder: str | Path, size: int) -> Float[Tensor, "n 3 size size"]:
    """The pictures of a folder in [0, 1], sorted by name, read as training reads them.

    Raises:
        BadInput: no such folder, no picture in it, or a file that is not a picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder of pictures: give one")
    found = FolderPictures(folder, size)
    return to_tensor([found.picture(i) for i in range(len(found))]) / 2 + 0.5


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
