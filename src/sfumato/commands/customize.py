"""``sfumato customize METHOD``: words and products from a few pictures, in one file."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.commands.verb import Where, beside, load, provenance, read
from sfumato.errors import BadInput
from sfumato.files import refuse_existing
from sfumato.plan import human_time
from sfumato.progress import alone
from sfumato.text import counted

EXAMPLE = "sfumato customize {name} --images mine/ --out mine.safetensors"


@dataclass(frozen=True, kw_only=True)
class Customize(Where):
    """Options of the verb."""

    model: str = "sketch"
    """An embedded model, a folder written by save_pretrained, a .safetensors file of SD 1.x, 2.x or XL, or a hub id."""
    images: Path
    """A folder of pictures of what is to be learned. A picture's prompt may stand beside it (NAME.txt) and names what
    is learned by the new word, by {} or by the word that it starts from."""
    out: Path
    """The .safetensors file for what was learned; `sfumato sample --adapter FILE` draws with it."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    from sfumato.data.pictures import read_pictures
    from sfumato.pipeline import customization

    entry, method, options = read("customize", args, Customize, EXAMPLE)
    if options.out.suffix != ".safetensors":
        raise BadInput(f"{options.out} must end in .safetensors, as in --out mine.safetensors")
    refuse_existing(options.out, options.overwrite)
    pipe = load(options.model, options)
    pictures, prompts = read_pictures(options.images, pipe.size, names=False)
    start = time.perf_counter()
    with beside(options.out, method) as folder:
        writes = [str(options.out), f"{folder}/ (until then: checkpoints)"]
        if alone():
            replace(method.plan(pipe), writes=writes).show()
        learned = method.learn(pipe, pictures, prompts, folder)
        if not alone():
            return
        about = {**provenance(entry, method, pipe, options.model), **learned.about, "pictures": len(pictures)}
        customization.save(options.out, replace(learned, about=about), pipe, options.overwrite)
    words = " and ".join(learned.stages or learned.words)
    took = f"{counted(len(pictures), 'picture')} in {human_time(time.perf_counter() - start)}"
    print(f"learned {words} from {took}: {options.out}")
    model = "" if options.model == "sketch" else f" --model {options.model}"
    print(f'draw with it: sfumato sample "a {words}"{model} --adapter {options.out} --out pictures/')
