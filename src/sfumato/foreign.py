"""The one door for files that others wrote: whatever a library makes of a bad one becomes a sentence about the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

from sfumato.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "fetch or write it again"
_LONGEST = 200
"""Characters of a reason."""
_KINDS: Mapping[Any, str] = {
    dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number", float: "a number",
}  # fmt: skip
_POINTER = b"version https://git-lfs"
_INTERNAL = re.compile(r"object at 0x|NoneType|__\w+__|positional argument|keyword argument|Traceback|has no attribute|"
                       r"<class |not supported between|not subscriptable|unsupported operand|dict_keys")  # fmt: skip
_CODE = "trust_remote_code"


@contextmanager
def reading(path: str | os.PathLike, what: str = "", advice: str = AGAIN) -> Iterator[None]:
    """Whatever goes wrong inside the block with the file or folder ``path`` is a `BadInput` that names it.

    Args:
        path: what is being read; also a name on the hub.
        what: what it was to be read as ("a CLIP", "a LoRA").
        advice: what to do next.

    Raises:
        BadInput: "PATH cannot be read as WHAT: REASON: ADVICE"; one that is raised inside passes as it is.
    """
    try:
        yield
    except (BadInput, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the panics of libraries in Rust are no Exception
        if isinstance(error, OSError) and error.errno == 28:  # a full disk is not the file's fault
            raise
        refuse_pointers(path)
        as_what = f" as {what}" if what else ""
        raise BadInput(f"{os.fspath(path)} cannot be read{as_what}: {reason(error)}: {advice}") from error


def reason(error: BaseException) -> str:
    """What an exception says, in one short line without Python's own words."""
    text = str(error)
    if _CODE in text:
        return "it wants code of its own to be run, which is never done"
    if isinstance(error, (RecursionError, MemoryError)):
        return "it is nested too deep" if isinstance(error, RecursionError) else "it asks for more memory than there is"
    if type(error).__name__ == "SafetensorError":
        return f"it is truncated or corrupt ({shortened(text.removeprefix('Error while deserializing header: '), 100)})"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not valid JSON (line {error.lineno})"
    if isinstance(error, UnicodeError):
        return "it is not text in UTF-8"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{Path(os.fsdecode(error.filename)).name} is not there"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, ImportError) and getattr(error, "name", None):
        return f"it needs another package, {error.name}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # torch names the weights that do not fit below its first line
        lines[0] = f"{lines[0]} {lines[1]}"
    line = re.sub(r"^Error\(s\) in loading state_dict for \w+: ", "", lines[0]).rstrip(".:") if lines else ""
    ours = isinstance(error, (TypeError, AttributeError, LookupError, AssertionError, NameError))
    if not line or ours or _INTERNAL.search(line):
        missing = isinstance(error, KeyError) and error.args and isinstance(error.args[0], str)
        return f"it lacks {shortened(error.args[0], 60)!r}" if missing else "it has not the form that it should have"
    return shortened(line)


def shortened(text: str, longest: int = _LONGEST) -> str:
    """``text`` with its middle left out where it is long."""
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} ... {text[-longest // 3 + 5 :]}"


def refuse_pointers(path: str | os.PathLike) -> None:
    """Name what stands for a file and is none, in a folder or its parts: git-lfs pointers and links to nowhere.

    Raises:
        BadInput: names the first.
    """
    path = Path(path)
    try:
        inside = [f for g in (path.glob("*"), path.glob("*/*")) for f in g] if path.is_dir() else [path]
        for file in sorted(inside):
            if file.is_symlink() and not file.exists():
                raise BadInput(f"{file} is a link to {shortened(os.readlink(file))}, which is not there: {AGAIN}")
            if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_POINTER):
                raise BadInput(f"{file} is a git-lfs pointer, not the file: run git lfs pull")
    except OSError:
        return


def read_json(path: str | os.PathLike, shape: Any = dict, advice: str = AGAIN) -> Any:
    """A JSON file of which the shape is known.

    Args:
        shape: the type of the whole (dict, list, ...); or, of an object, the type of each part that is looked at
            later, where ``str | None`` may also be null or absent.

    Raises:
        BadInput: it cannot be read, or is of another shape; the sentence says which part.
    """
    with reading(path, advice=advice):
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"), parse_int=_whole)
    return shaped(data, shape, path, advice)


def _whole(digits: str) -> int:
    """A whole number of JSON, small enough for whoever computes with it as a float."""
    if len(digits) > 300:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def shaped(data: Any, shape: Any, where: str | os.PathLike, advice: str = AGAIN) -> Any:
    """``data``, if it is of the ``shape`` (see `read_json`); ``where`` stands for it in the refusal."""
    parts = shape if isinstance(shape, Mapping) else {}
    _fits(data, dict if parts else shape, f"{os.fspath(where)} holds", advice)
    for name, kind in parts.items():
        _fits(data.get(name), kind, f"{name} in {os.fspath(where)} is", advice)
    return data


def read_tensors(path: str | os.PathLike, what: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file by name, on the CPU, and its header's metadata.

    Raises:
        BadInput: there is no such file, it is truncated or corrupt, or holds numbers that are not finite.
    """
    from safetensors import safe_open

    from sfumato.finite import require_finite

    with reading(path, what), safe_open(path, "pt") as opened:
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        header = dict(opened.metadata() or {})
    require_finite(tensors.items(), os.fspath(path))
    return tensors, header


def read_header(path: str | os.PathLike, what: str = "") -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        BadInput: as `read_tensors`.
    """
    from safetensors import safe_open

    with reading(path, what), safe_open(path, "pt") as opened:
        return dict(opened.metadata() or {})


def _fits(value: Any, kind: Any, told: str, advice: str) -> None:
    # JSON's true is no number, though Python's is
    if isinstance(value, bool) and bool not in _each(kind) and object not in _each(kind):
        fits = False
    else:
        fits = isinstance(value, kind)
    if not fits:
        wanted = " or ".join(_KINDS.get(k, "null") for k in _each(kind) if k is not type(None))
        found = "null or absent" if value is None else _KINDS.get(type(value), type(value).__name__)
        raise BadInput(f"{told} {found}, not {wanted}: {advice}")


def _each(kind: Any) -> tuple[Any, ...]:
    return kind.__args__ if isinstance(kind, UnionType) else kind if isinstance(kind, tuple) else (kind,)
