"""``sfumato edit METHOD``: change a picture, or one drawn from a prompt, and look at what became of it."""

from __future__ import annotations

import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from sfumato.commands.options import STEPS
from sfumato.commands.sample import read_seeds
from sfumato.commands.verb import Equipped, load_equipped, read
from sfumato.errors import BadInput
from sfumato.fields import Count
from sfumato.files import GENERATED, atomic_folder, contact_sheet, refuse_existing, save_png, write_json
from sfumato.plan import human_time
from sfumato.text import counted
from sfumato.versions import versions

if TYPE_CHECKING:
    from sfumato.edit.base import Edited, Given

LONGEST = 80
"""Characters of a file's name, about."""
EXAMPLE = 'sfumato edit {name} "a red star" --image picture.png --out {name}/'


@dataclass(frozen=True, kw_only=True)
class Edit(Equipped):
    """Options of the verb."""

    out: Path
    """Folder for the pictures, a sheet of each strip, the record and a page (index.html)."""
    model: str = "sketch"
    """An embedded model, a folder written by save_pretrained, a .safetensors file of SD 1.x, 2.x or XL, or a hub id."""
    prompts: Annotated[tuple[str, ...], Positional]
    """What the pictures show, or are drawn from; for methods that put a subject into a picture, what is to come. One
    for all, or one each."""
    images: tuple[Path, ...] = ()
    """Pictures to edit; they are cropped to squares. None: drawn from the prompts."""
    seeds: str = "0"
    """Of pictures that are drawn, as in 7 or 0-3 or 1,5,9; every prompt is drawn once with each."""
    size: Count | None = None
    """Side of the pictures in pixels; by default the model's own."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    entry, method, options = read("edit", args, Edit, EXAMPLE, STEPS)
    refuse_existing(options.out, options.overwrite)
    if not options.images and not options.prompts:
        example = EXAMPLE.format(name=entry.name)
        raise BadInput(f"give a picture with --image FILE, a prompt, or both, as in `{example}`")
    if entry.load().subject and not options.images:
        raise BadInput(f"{entry.name} puts something into a picture: give one with --image FILE")
    pipe = load_equipped(options.model, options)
    given = _given(options, pipe.size)
    method.check(pipe, given)
    writes = [f"{options.out}/ (PNG, sheets, edit.json, index.html)"]
    replace(method.plan(pipe, given), writes=writes).show()
    start = time.perf_counter()
    edited = method.edit(pipe, given, progress=True)
    seconds = time.perf_counter() - start
    about = {
        "model": options.model, "model-sha256": pipe.describe()["sha256"], "prompts": given.prompts,
        "seeds": given.seeds, "method": {"name": entry.name, "verb": "edit", "paper": str(entry.paper)},
        "configuration": asdict(method),
    }  # fmt: skip
    _write(options, given, edited, about, seconds)
    print(f"{counted(len(given), 'picture')} edited with {entry.name} in {human_time(seconds)}: {options.out}", end="")
    for name, values in edited.told.get("errors", {}).items():
        print(f"; error of the {name} {sum(values) / len(values):.4f}", end="")
    print(f"\nlook at them in {options.out / 'index.html'}")


def _given(options: Edit, size: int) -> Given:
    """What the options ask to be edited."""
    from sfumato.data.pictures import squares
    from sfumato.edit.base import Given

    prompts, seeds = options.prompts or ("",), tuple(read_seeds(options.seeds))
    if not options.images:
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        return Given(tuple(p for p, _ in pairs), tuple(s for _, s in pairs))
    if missing := [file for file in options.images if not file.is_file()]:
        raise BadInput(f"{missing[0]} is no picture file: give PNG, JPEG or WebP files after --image")
    return Given(prompts, seeds, squares(options.images, options.size or size))


def _write(options: Edit, given: Given, edited: Edited, about: dict[str, Any], seconds: float) -> None:
    """Pictures, sheets, record, tensors and page: all or nothing."""
    from safetensors.torch import save_file

    from sfumato.edit.parts.directions import FILE
    from sfumato.report.edit import EditReport, arrays, render

    names = [file.stem for file in options.images] or [f"seed{seed}" for seed in given.each(given.seeds)]
    prompts = given.each(given.prompts)
    strips = arrays(edited.strips)
    taken: set[str] = set()
    with atomic_folder(options.out, options.overwrite) as folder:
        for i, name in enumerate(names):
            for track, row in zip(edited.tracks, strips[i], strict=True):
                for stop, picture in zip(edited.stops, row, strict=True):
                    told = {**about, "prompt": prompts[i], "track": track, "stop": stop}
                    save_png(folder / _file(taken, i, name, track, stop), picture, told)
            sheet = strips[i].reshape(-1, *strips.shape[3:])
            save_png(folder / f"{i:03d}-sheet.png", contact_sheet(sheet, len(edited.stops)), about)
            for label, maps in edited.maps.items():
                save_png(folder / _file(taken, i, label), maps[i].cpu().numpy(), about)
        if edited.tensors:
            save_file({k: x.contiguous() for k, x in edited.tensors.items()}, folder / FILE, dict(edited.labels))
        record = {**about, "options": asdict(options), "told": edited.told, "seconds": round(seconds, 3)}
        record |= {"tracks": edited.tracks, "stops": edited.stops, "plain": edited.plain, "source": GENERATED}
        write_json(folder / "edit.json", {**record, "versions": versions()})
        command = shlex.join(["sfumato", *sys.argv[1:]])
        report = EditReport(about["method"]["name"], edited, names, prompts, about, command)
        (folder / "index.html").write_text(render(report), encoding="utf-8")


def _file(taken: set[str], row: int, *words: str) -> str:
    """A name that is not ``taken`` yet, and is from now on; where it is too long, what the first word says is cut."""
    slug = _slug(*words)
    if len(slug) > LONGEST and len(words) > 1:
        last = _slug(*words[1:])[-LONGEST:]
        slug = f"{_slug(words[0])[: max(8, LONGEST - len(last) - 1)].strip('-')}-{last}"
    file, n = f"{row:03d}-{slug[:2 * LONGEST]}", 1
    while file in taken:
        n += 1
        file = f"{row:03d}-{slug[:2 * LONGEST]}-{n}"
    taken.add(file)
    return f"{file}.png"


def _slug(*words: str) -> str:
    text = "-".join(words).lower().replace("\N{MINUS SIGN}", "minus").replace("+", "plus")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "picture"
