"""The pictures that a workflow's are held against."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sfumato.data.base import to_square, to_tensor
from sfumato.data.folders import pictures_in
from sfumato.errors import BadInput

from .workflow import Workflow, base_of


def read_originals(source: Path, workflow: Workflow, device: str | None = None) -> Float[Tensor, "m 3 side side"]:
    """The originals in [0, 1], as central squares of the side that the workflow draws.

    Raises:
        BadInput: there are none, or one cannot be read.
    """
    files = [source] if source.is_file() else pictures_in(source) if source.is_dir() else []
    if not files:
        raise BadInput(f"{source} holds no originals: give a picture, or a folder of pictures")
    side = workflow.size or base_of(workflow, device).size
    return (to_tensor([to_square(file, side) for file in files]) + 1) / 2
