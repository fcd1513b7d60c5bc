"""``sfumato compose``: declared subjects together, from the latent of an anchor picture; every picture is marked."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional

from sfumato.commands.options import STEPS, parse
from sfumato.commands.sample import read_seeds, seed_alias
from sfumato.commands.verb import Equipped, load_equipped
from sfumato.errors import BadInput
from sfumato.fields import Count
from sfumato.files import GENERATED, atomic_folder, refuse_existing, write_json
from sfumato.plan import Plan
from sfumato.text import counted
from sfumato.versions import versions

if TYPE_CHECKING:
    from sfumato.customize.parts.anchor import Marked

EXAMPLE = 'sfumato compose "a <mine1> star, a <mine2> fish" --anchor layout.png --adapter mine.safetensors --out two/'
ABOUT = """Anchored composition, arXiv:2309.14751, for synthetic, licensed and consented subjects: the anchor gives
layout and poses, the words give looks.

Every picture has a mark in its pixels, metadata and a sidecar (NAME.json), all read back; where that fails, nothing is
written. There is no contact sheet and no page, which would hold pictures without marks. `sfumato verify PICTURE` reads
them."""


@dataclass(frozen=True, kw_only=True)
class Compose(Equipped):
    """Options of the command."""

    prompt: Annotated[str, Positional]
    """What to draw, with the subjects named by their words before their class nouns."""
    anchor: Path
    """The picture to begin at; it is cropped to a square."""
    out: Path
    """Folder for the marked pictures, the sidecar of each, and the record."""
    model: str = "sketch"
    """The model that the subjects were taught, with their file as --adapter; or a folder of one that knows them."""
    seeds: str = "0"
    """Seeds, as in 7 or 0-3 or 1,5,9; one picture each."""
    strength: float = 0.6
    """How much is drawn anew, more than 0 and at most 1: small keeps the anchor."""
    mode: Literal["noised", "raw", "inverted"] = "noised"
    """How the anchor's latent enters: with noise, as it is, or inverted, which keeps most of the layout."""
    sampling_steps: Count = 50
    """Denoising steps, of which the last int(steps * strength) are taken (with a flow, rounded up)."""
    cfg_scale: float | None = None
    """Guidance; 1 is none; by default the model's own."""
    captured: bool = False
    """The anchor is a photograph, which the metadata then say."""
    size: Count | None = None
    """Side of the pictures in pixels; by default the model's own."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\n{ABOUT}"
    options = Compose(**parse("sfumato compose", seed_alias(args), Compose, about=about, aliases=STEPS)[0])
    seeds = read_seeds(options.seeds)
    if not options.prompt.strip():
        raise BadInput(f"say what to draw, with the subjects named by their words, as in `{EXAMPLE}`")
    if not options.anchor.is_file():
        raise BadInput(f"--anchor: there is no file {options.anchor}")
    refuse_existing(options.out, options.overwrite)

    from sfumato.customize.parts.anchor import compose
    from sfumato.data.base import to_square
    from sfumato.data.pictures import to_tensor

    pipe = load_equipped(options.model, options)
    anchor = (to_tensor([to_square(options.anchor, options.size or pipe.size)])[0] / 2 + 0.5).clamp(0, 1)
    taken = options.sampling_steps - pipe.clock.first_step(options.strength, options.sampling_steps)
    title = f"{counted(len(seeds), 'marked picture')} with {counted(taken, 'step')} from {options.anchor}"
    Plan(title, writes=[f"{options.out}/ (PNG, the sidecar of each, compose.json)"]).show()
    names = ("strength", "mode", "sampling_steps", "cfg_scale", "captured")
    made = compose(pipe, anchor, options.prompt, seeds, **{name: getattr(options, name) for name in names})
    files = [f"{i:03d}-{_slug(options.prompt)}-seed{seed}.png" for i, seed in enumerate(seeds)]
    record = {
        "command": shlex.join(["sfumato", *sys.argv[1:]]), "options": asdict(options),
        "model": {"model": options.model, **pipe.describe()}, "subjects": made[0].manifest["subjects"],
        "pictures": {name: one.payload for name, one in zip(files, made, strict=True)}, "source": GENERATED,
        "versions": versions(),
    }  # fmt: skip
    with atomic_folder(options.out, options.overwrite) as folder:
        for name, one in zip(files, made, strict=True):
            one.save(folder / name)
        write_json(folder / "compose.json", record)
        for name, one in zip(files, made, strict=True):
            require_marked(folder / name, one)
    print(f"{counted(len(seeds), 'picture')} in {options.out}, each marked, with its sidecar, and read back")


def require_marked(file: Path, made: Marked) -> None:
    """Refuse a written picture whose mark, metadata and sidecar do not all say what they should.

    Raises:
        MarkFailed: as said.
    """
    from sfumato.customize.parts.anchor import verify
    from sfumato.pipeline.watermark import MarkFailed

    found, beside = verify(file), json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    if not (found.watermark.marked and found.watermark.payload == made.payload and found.manifest == beside):
        raise MarkFailed(f"mark, metadata and sidecar of {file.name} do not agree: nothing was written")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"
