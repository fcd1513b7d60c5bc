"""A folder of pictures protected, batch by batch: what is finished stays, and the same call goes on after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import held, save_png, sha256_of, write_json
from sfumato.pipeline import Text2Image
from sfumato.progress import bar

from ..base import Protection
from .files import PROTECTED, RECORD, Given, claim, finished, found_in, levels, read_picture


@dataclass(frozen=True)
class Pair:
    """A picture before and after, in its own mode, in [0, 1] (one row)."""

    name: str
    clean: Float[Tensor, "1 channel height width"]
    safe: Float[Tensor, "1 channel height width"]

    @property
    def levels(self) -> int:
        """The largest change of any value, in levels of the two files."""
        return int((255 * (self.safe - self.clean)).round().abs().max())


def settings_of(method: Protection, p: Text2Image) -> dict[str, Any]:
    """All that decides the protected pictures, as JSON has it."""
    told = {"method": type(method).__name__, "model": p.describe()["sha256"], **asdict(method)}
    if told.get("target") is not None:
        told["target"] = sha256_of(told["target"])
    return json.loads(json.dumps(told, default=str))


def protect_folder(
    method: Protection, p: Text2Image, source: Path, out: Path, *, progress: bool = False
) -> dict[str, Any]:
    """Protect every picture of ``source`` (a folder or a file) into ``out``, with ``protect.json`` beside them.

    Every picture is written whole as soon as its batch is finished; killed at any moment, the same call goes on with
    the batches that are left and comes to the same files. A picture that has changed since is protected again. Batches
    are runs of pictures of one shape in the order of their names, so that what is finished does not change them.

    Returns:
        The record, ``protect.json``: the settings, and for each picture its levels and hashes.

    Raises:
        BadInput: no pictures, or one that cannot be protected in its mode (before anything is computed); a folder with
            other settings or of something else; another process at work in it.
    """
    given = found_in(source)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise BadInput(f"{out} lies in {source}, whose pictures are protected: choose a folder beside it")
    shapes = [read_picture(g.file).shape for g in given]
    with held(out) as folder:
        record = claim(folder, settings_of(method, p))
        left = []
        for batch in batches(given, shapes, method.batch):
            if not all(finished(folder, g, record) for g in batch):
                left.append(batch)
        with bar("protecting", sum(method.steps(len(b)) for b in left), progress) as advance:
            for batch in left:
                clean = torch.cat([read_picture(g.file) for g in batch])
                safe = method.run(p, clean, advance=advance)
                for g, before, after in zip(batch, clean, safe, strict=True):
                    record["pictures"][g.name] = _kept(folder, g, before, after, method)
                write_json(folder / RECORD, record, overwrite=True)
    return record


def batches(given: Sequence[Given], shapes: Sequence[torch.Size], batch: int) -> Iterator[list[Given]]:
    """Runs of pictures of one shape, at most ``batch`` long."""
    run: list[Given] = []
    for i, g in enumerate(given):
        if run and (len(run) == batch or shapes[i] != shapes[i - 1]):
            yield run
            run = []
        run.append(g)
    yield run


def _kept(folder: Path, given: Given, before: Tensor, after: Tensor, method: Protection) -> dict[str, Any]:
    target = folder / given.name
    about: Mapping[str, Any] = {"Source": PROTECTED, "Method": type(method).__name__, "Budget": method.budget}
    save_png(target, levels(after), about, overwrite=True)
    moved = Pair(given.name, before[None], after[None]).levels
    return {"file": str(given.file), "given": sha256_of(given.file), "written": sha256_of(target), "levels": moved}


def pairs(source: Path, out: Path, most: int) -> list[Pair]:
    """The first pictures before and after, read from their files."""
    return [Pair(g.name, read_picture(g.file), read_picture(out / g.name)) for g in found_in(source)[:most]]
