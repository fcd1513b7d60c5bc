"""What comes in from outside: models by name, and files sent by the browser. Nothing here runs what it is given."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path

from sfumato.errors import BadInput
from sfumato.foreign import read_header, refuse_pointers
from sfumato.plan import human_bytes
from sfumato.settings import EMBEDDED
from sfumato.text import visible


def model_named(text: object) -> str:
    """An embedded model's name, or the absolute path of a folder or file that is there; nothing is fetched.

    Raises:
        BadInput: it is none of these, or a pickle.
    """
    said = text.strip() if isinstance(text, str) else ""
    if said in EMBEDDED:
        return said
    if not said:
        known = ", ".join(EMBEDDED)
        raise BadInput(f"name a model: {known}, a folder written by save_pretrained or a .safetensors file")
    try:
        path = Path(said).expanduser()
        there = path.exists()
    except (OSError, ValueError, RuntimeError):
        there = False
    if not there:
        raise BadInput(
            f"there is no model {visible(said)!r} on this machine: give {', '.join(EMBEDDED)}, a folder written by "
            "save_pretrained or a .safetensors file (the studio fetches nothing)"
        )
    if path.is_file():
        refuse_others(path)
    return str(path.resolve())


def refuse_others(path: Path, name: str = "") -> None:
    """Raise `BadInput` for a file that is not in the safetensors format; pickles are named as such and never opened.

    Args:
        path: the file.
        name: what its sender called it.
    """
    from sfumato.pipeline.single.facts import PICKLE  # with torch, which is not waited for at the start
    from sfumato.pipeline.sound import PICKLES

    name = visible(name or path.name)
    refuse_pointers(path)
    with path.open("rb") as file:
        head = file.read(9)
    zipped, pickled = head.startswith(b"PK\x03\x04"), head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"
    if Path(name).suffix.lower() in PICKLES or ((zipped or pickled) and head[8:9] != b"{"):
        raise BadInput(f"{name} is a pickle or an archive, which can run code when it is read: {PICKLE}")
    length = struct.unpack("<Q", head[:8])[0] if len(head) == 9 else 0
    if head[8:9] != b"{" or length > path.stat().st_size:
        raise BadInput(f"{name} is no model in the safetensors format: give a .safetensors file")
    read_header(path)


def taken_in(sent: str | Path, name: str, folder: Path, largest: int) -> Path:
    """A file sent by the browser, looked at and moved into ``folder`` under a plain name.

    Args:
        sent: where the server has put it.
        name: what its sender called it.
        folder: made when missing.
        largest: bytes.

    Raises:
        BadInput: it is too large, a pickle, or no safetensors file; it is deleted.
    """
    sent = Path(sent)
    try:
        if (size := sent.stat().st_size) > largest:
            raise BadInput(
                f"{visible(name)} has {human_bytes(size)}, more than the {human_bytes(largest)} that are taken: "
                "put it on this machine's disk and give its path"
            )
        refuse_others(sent, name)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem).strip("-.")[:60] or "model"
        names = (folder / f"{stem}{f'-{i}' if i else ''}.safetensors" for i in range(10_000))
        target = next(name for name in names if not name.exists())
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(sent, target)
    finally:
        sent.unlink(missing_ok=True)
    return target
