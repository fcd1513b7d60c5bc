"""``sfumato decompress``: the picture that the bytes of `sfumato compress` stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from sfumato.commands.compress import compression_model
from sfumato.commands.options import STEPS, parse
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, Seed, Share
from sfumato.files import refuse_existing, save_png

EXAMPLE = "sfumato decompress photo.sfc --model run/ --out photo-back.png"


@dataclass(frozen=True, kw_only=True)
class Decompress:
    """Options of the command."""

    file: Annotated[Path, Positional]
    """A file that `sfumato compress` wrote."""
    model: str
    """The model that it was written with."""
    out: Path
    """The PNG for the picture."""
    realism: Share = 1.0
    """1: details are drawn anew, so that it looks real; 0: the blurred picture with the least squared error, at once;
    between them a blend."""
    sampling_steps: Count | None = None
    """Steps of the drawing; by default the model's own."""
    seed: Seed = 0
    """Of the noise that it is drawn from: the same seed gives the same picture."""
    tile: Natural = 0
    """Draw large pictures in tiles of so many pixels a side, which takes less memory; 0: all at once."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\nWhat is drawn anew looks right and need not be what was there."
    options = Decompress(**parse("sfumato decompress", args, Decompress, about=about, aliases=STEPS)[0])
    refuse_existing(options.out, options.overwrite)
    if options.out.suffix.lower() != ".png":
        raise BadInput(f"{options.out} must end in .png, as in `{EXAMPLE}`")
    if not options.file.is_file():
        raise BadInput(f"there is no file {options.file}: name one, as in `{EXAMPLE}`")
    model, data = compression_model(options.model, options.device), options.file.read_bytes()
    settings = {"sampling_steps": options.sampling_steps, "tile": options.tile or None, "progress": True}
    picture = model.decompress(data, seed=options.seed, realism=options.realism, name=str(options.file), **settings)
    about_it = {"model": options.model, "seed": options.seed, "realism": options.realism, "bytes": len(data)}
    save_png(options.out, picture.permute(1, 2, 0).numpy(), about_it, options.overwrite)
    print(f"{picture.shape[2]} x {picture.shape[1]} pixels of {len(data):,} bytes: {options.out}")
