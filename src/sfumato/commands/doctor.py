"""``sfumato doctor``: is this installation sound?"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import sfumato
from sfumato.commands.tables import show_table
from sfumato.errors import BadInput
from sfumato.files import sha256_of
from sfumato.plan import human_bytes

ABOUT = """Example: sfumato doctor

Versions, devices, optional extras, embedded models and disk. Exit status 1 if something is broken. With --model,
instead: what a model takes in memory, part by part, read off its files; with --method too, what one step of an eraser
or attack takes, traced without weights (docs/cards.md lists all methods)."""
SUMS = "SHA256SUMS"


@dataclass(frozen=True, kw_only=True)
class Room:
    """Whose memory is asked for."""

    model: str | None = None
    """An embedded model or a folder written by save_pretrained; or "sd1" or "sdxl", the published shapes of SD 1.x and
    SDXL, of which no file is needed."""
    method: str | None = None
    """An eraser or an attack that would run on it, with its own settings."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision in which the weights would be loaded."""


def main(args: list[str]) -> int:
    if args:
        from sfumato.commands.options import parse

        [values] = parse("sfumato doctor", args, Room, about=ABOUT)
        if values["model"] is None:
            raise BadInput("--method and --dtype ask about a model: name one with --model")
        show_table(("what", "parameters", "memory"), room(Room(**values)))
        return 0
    rows = [("ok", "sfumato", sfumato.__version__), ("ok", "python", platform.python_version())]
    rows += requirements() + devices() + assets(Path(sfumato.__file__).parent / "assets")
    rows.append(("ok", "free disk here", human_bytes(shutil.disk_usage(".").free)))
    show_table(("", "what", "found"), rows)
    broken = [what for state, what, _ in rows if state == "BROKEN"]
    print(f"broken: {', '.join(broken)}" if broken else "all is well")
    return 1 if broken else 0


def room(asked: Room) -> list[tuple[str, str, str]]:
    """(what, parameters, bytes) of a model's parts, and what a method says that it takes; no weights are loaded.

    Raises:
        BadInput: as `sfumato.load` for a folder; no such eraser, or one that does not fit.
    """
    import torch

    from sfumato import catalog
    from sfumato.commands.cards import made, need
    from sfumato.pipeline.partial import open_partially
    from sfumato.pipeline.single.published import SHAPES, published
    from sfumato.settings import settings_for

    partial = None
    if asked.model in SHAPES and not Path(asked.model).is_dir():
        pipe = published(asked.model, getattr(torch, asked.dtype))
    else:
        partial = open_partially(asked.model, getattr(torch, asked.dtype))
        pipe = partial.pipe
    rows, total = [], 0
    for name, part in pipe.parts().items():
        sizes = [(x.numel(), x.numel() * x.element_size()) for x in part.parameters()]
        count, size = (sum(column) for column in zip(*sizes, strict=True))
        total += size
        rows.append((name, f"{count:,}", human_bytes(size)))
    rows.append(("in all", "", human_bytes(total)))
    if asked.method is None:
        return rows
    verb = "attack" if asked.method in {m.name for m in catalog.methods("attack")} else "erase"
    cls = catalog.get(asked.method, verb).load()
    method = made(verb, asked.method, **settings_for(cls, asked.model))
    needed = need(pipe, method).rows()
    rows += [(f"{asked.method}: {part}", "", human_bytes(size)) for part, size in needed]
    if not needed:
        rows.append((f"{asked.method}: nothing of the network is differentiated", "", ""))
    if hasattr(cls, "run_in_folder") and partial is not None:
        pipe.projections(*(cls.needs if set(cls.needs) <= set(pipe.anatomy.kinds) else cls.needs_instead))
        rows.append((f"{asked.method}, by files: weights concerned", "", human_bytes(partial.held)))
    return rows


def requirements() -> list[tuple[str, str, str]]:
    """(state, name, version) of what sfumato needs (missing is broken) and of its extras (they may be)."""
    from packaging.requirements import Requirement

    rows = {}
    try:
        lines = metadata.requires("sfumato") or []
    except metadata.PackageNotFoundError:
        return [("BROKEN", "installation", "the package is not installed: pip install -e .")]
    for line in lines:
        needed = Requirement(line)
        extra = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        if needed.name == "sfumato" or (extra and needed.name in rows):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            state, found = ("-", "not installed (optional)") if extra else ("BROKEN", "missing")
        else:
            fits = needed.specifier.contains(found, prereleases=True)
            state, found = ("ok", found) if fits else ("BROKEN", f"{found}, but {needed.specifier} is needed")
        rows[needed.name] = (state, needed.name, found)
    return sorted(rows.values(), key=lambda row: row[0] == "-")


def devices() -> list[tuple[str, str, str]]:
    """What torch can compute on."""
    if util.find_spec("torch") is None:
        return []
    import torch

    rows = [("ok", "cpu", f"{torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        rows.append(("ok", f"cuda:{i}", f"{found.name}, {human_bytes(found.total_memory)}"))
    if torch.backends.mps.is_available():
        rows.append(("ok", "mps", "available"))
    return rows


def assets(folder: Path) -> list[tuple[str, str, str]]:
    """Every embedded file against its line in ``SHA256SUMS``, which ``sha256sum`` wrote."""
    sums = folder / SUMS
    if not sums.is_file():
        return [("BROKEN", "embedded models", f"{SUMS} is missing: install the package again")]
    rows: dict[str, list[str]] = {}
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, name = line.split(maxsplit=1)
        name = name.removeprefix("*").removeprefix("./")
        wrong = rows.setdefault(name.split("/")[0], [])
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif sha256_of(folder / name) != digest:
            wrong.append(f"{name} differs from what was shipped")
    return [
        ("BROKEN" if wrong else "ok", f"embedded {name}", "; ".join(wrong) or "checksums agree")
        for name, wrong in rows.items()
    ]
