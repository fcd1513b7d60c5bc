"""``sfumato compress``: a picture as few bytes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from sfumato.commands.options import parse
from sfumato.errors import BadInput
from sfumato.files import atomic_file, refuse_existing
from sfumato.plan import human_bytes

EXAMPLE = "sfumato compress photo.png --model run/ --out photo.sfc"


@dataclass(frozen=True, kw_only=True)
class Compress:
    """Options of the command."""

    file: Annotated[Path, Positional]
    """A picture of any size, PNG, JPEG, WebP or whatever else Pillow reads."""
    model: str
    """A folder that `sfumato train hfd` wrote; the same model has to be there to decompress."""
    out: Path
    """The file for the bytes."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\nThe bits that are told are those of the file, its header included."
    options = Compress(**parse("sfumato compress", args, Compress, about=about)[0])
    refuse_existing(options.out, options.overwrite)
    if not options.file.is_file():
        raise BadInput(f"there is no picture {options.file}: name a file, as in `{EXAMPLE}`")

    import numpy as np

    from sfumato.data.base import to_image

    picture = np.asarray(to_image(options.file))
    data = compression_model(options.model, options.device).compress(picture)
    with atomic_file(options.out, options.overwrite) as temporary:
        temporary.write_bytes(data)
    height, width = picture.shape[:2]
    rate = 8 * len(data) / (height * width)
    was = human_bytes(options.file.stat().st_size)
    print(f"{width} x {height} pixels, {was}, in {len(data):,} bytes, {rate:.3f} bits per pixel: {options.out}")
    # Not under the picture's own name, which the bytes often have too: it is never overwritten unasked.
    back = options.out.with_name(f"{options.out.stem}-back.png")
    line = ["sfumato", "decompress", str(options.out), "--model", options.model, "--out", str(back)]
    print(f"get it back: {shlex.join(line)}")


def compression_model(name: str, device: str | None) -> Any:
    """The model, if it is one that compresses.

    Raises:
        BadInput: it is not, or there is none.
    """
    from sfumato.pipeline import CompressionModel, load

    model = load(name, device)
    if not isinstance(model, CompressionModel):
        raise BadInput(f"{name} does not compress pictures: `sfumato train hfd` makes a model that does")
    return model
