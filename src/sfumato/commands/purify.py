"""``sfumato purify``: take what a model no longer draws out of pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional

from sfumato.commands.options import STEPS, parse
from sfumato.commands.verb import Equipped, load, load_equipped, origin
from sfumato.errors import BadInput
from sfumato.fields import Count
from sfumato.files import GENERATED, atomic_folder, contact_sheet, refuse_existing, save_png, write_json
from sfumato.plan import Plan
from sfumato.text import counted

EXAMPLE = 'sfumato purify "a red star" --model erased/ --images mine/ --out purified/'


@dataclass(frozen=True, kw_only=True)
class Purify(Equipped):
    """Options of the command."""

    model: str
    """The erased pipeline, such as `sfumato erase surgical` writes."""
    original: str | None = None
    """The pipeline before erasure, which inverts and gives the control; by default the embedded model that the erased
    one was made from, where its record says so, else the erased one inverts and there is no control."""
    images: Path
    """A folder of pictures; they are cropped to their central square, of the model's size."""
    prompt: Annotated[str, Positional]
    """What they show, with the concept named."""
    inversion_prompt: str | None = None
    """What the inversion is told instead; "" is nothing."""
    sampling_steps: Count = 50
    """Denoising steps, of the inversion and of the drawing."""
    cfg_scale: float | None = None
    """Guidance of the drawing; by default the model's own."""
    out: Path
    """Folder for the pictures, the controls, a sheet (what was given, without the concept, control) and the record."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    options = Purify(**parse("sfumato purify", args, Purify, about=f"Example: {EXAMPLE}", aliases=STEPS)[0])
    refuse_existing(options.out, options.overwrite)
    if not options.prompt.strip():
        raise BadInput(f"say what the pictures show, the concept included, as in `{EXAMPLE}`")
    if not options.images.is_dir():
        raise BadInput(f"{options.images} is no folder of pictures: give one")

    from sfumato.data.folders import FolderPictures
    from sfumato.data.pictures import to_tensor
    from sfumato.erase.parts.purify import purify

    erased = load_equipped(options.model, options)
    before = options.original or origin(options.model)
    original = None if before is None else load(before, options)
    found = FolderPictures(options.images, erased.size)
    pictures = to_tensor([found.picture(i) for i in range(len(found))]) / 2 + 0.5
    title = f"{counted(len(found), 'picture')} with {counted(options.sampling_steps, 'step')} there and back"
    Plan(title, writes=[f"{options.out}/ (PNG, sheet.png, purify.json)"]).show()
    done = purify(
        erased,
        pictures,
        options.prompt,
        original=original,
        inversion_prompts=options.inversion_prompt,
        sampling_steps=options.sampling_steps,
        cfg_scale=options.cfg_scale,
        progress=True,
    )
    sides = {"given": pictures, "purified": done.pictures} | ({} if done.control is None else {"control": done.control})
    arrays = {name: (x.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8) for name, x in sides.items()}
    names = [file.stem for file in found.files]
    about = {"model": options.model, "original": before, "prompt": options.prompt, "source": GENERATED}
    with atomic_folder(options.out, options.overwrite) as folder:
        for i, name in enumerate(names):
            for side in list(sides)[1:]:
                save_png(folder / f"{i:03d}-{name}-{side}.png", arrays[side][i], about)
        rows = np.stack(list(arrays.values()), axis=1).reshape(-1, *pictures.permute(0, 2, 3, 1).shape[1:])
        save_png(folder / "sheet.png", contact_sheet(rows, len(sides)), about)
        told = [
            {"picture": name, "moved": done.moved[i]}
            | ({} if done.control_moved is None else {"control_moved": done.control_moved[i]})
            for i, name in enumerate(names)
        ]
        write_json(folder / "purify.json", {**asdict(options), **about, "pictures": told})
    mean = lambda values: sum(values) / len(values)
    against = "" if done.control_moved is None else f"; reconstructed by the original: {mean(done.control_moved):.3f}"
    print(f"{counted(len(names), 'picture')} in {options.out}, moved by {mean(done.moved):.3f}{against}")
