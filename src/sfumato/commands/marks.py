"""``sfumato verify PICTURE``: the marks of pictures that `sfumato compose` and models of declared subjects draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from sfumato.commands.options import parse
from sfumato.errors import BadInput, SfumatoError
from sfumato.text import counted, visible

if TYPE_CHECKING:
    from sfumato.customize.parts.anchor import Report

EXAMPLE = "sfumato verify two/000-picture-seed0.png"
ABOUT = """Reads the mark in the pixels and the metadata. The status is 1 unless every picture has a mark and its
metadata, where there are any, name the same number. A mark outlives JPEG of usual quality and, with --size, enlarging;
that there is none proves nothing."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Of pictures, by which they are told from other evidence."""
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Options of the command."""

    pictures: Annotated[tuple[Path, ...], Positional]
    """Pictures to read marks from."""
    size: tuple[int, int] | None = None
    """Height and width before they were resized, as their sidecars say them; by default their own."""


class Unmarked(SfumatoError):
    """A picture has no mark, or says two things."""


def asked(args: Sequence[str]) -> bool:
    """Whether ``args`` ask about pictures."""
    words = [arg for arg in args if not arg.startswith("-")]
    return bool(words) and Path(words[0]).suffix.lower() in SUFFIXES


def main(args: list[str]) -> None:
    from sfumato.customize.parts.anchor import verify

    options = Pictures(**parse("sfumato verify", args, Pictures, about=f"Example: {EXAMPLE}\n\n{ABOUT}")[0])
    if missing := [file for file in options.pictures if not file.is_file()]:
        raise BadInput(f"there is no file {missing[0]}")
    if options.size is not None and min(options.size) < 1:
        raise BadInput("--size takes a height and a width in pixels, as in --size 512 512")
    wrong = []
    for file in options.pictures:
        found = verify(file, options.size)
        print(f"{visible(str(file))}: {told(found)}")
        if not found.watermark.marked or found.agree is False:
            wrong.append(file.name)
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if wrong[SHOWN:] else []
        raise Unmarked(f"not marked, or not as the metadata say: {', '.join([*wrong[:SHOWN], *more])}")
    print(f"{counted(len(options.pictures), 'picture')} marked")


def told(found: Report) -> str:
    """What was read from a picture, in one line."""
    mark = found.watermark
    share = f"{mark.agreeing} of {counted(mark.votes, 'coefficient')} agree, p {mark.p_value:.2g}"
    said = [f"mark {mark.payload} ({share})" if mark.marked else f"no mark ({share})"]
    if not isinstance(found.manifest, Mapping):
        return "; ".join([*said, "no metadata"])
    names = found.manifest.get("subjects")
    of = f" of {', '.join(map(str, names))}" if isinstance(names, Mapping) else ""
    whether = {True: "name the same number", False: "name another number", None: "name no number"}[found.agree]
    return visible("; ".join([*said, f"the metadata{of} {whether}"]))
