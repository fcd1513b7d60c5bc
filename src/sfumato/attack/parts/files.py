"""Pictures for attacks."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sfumato.data.folders import FolderPictures
from sfumato.data.pictures import to_tensor
from sfumato.errors import BadInput


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
