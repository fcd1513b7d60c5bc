"""Words of others, shown so that they cannot change what stands around them: on pages, in cards, on the terminal."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_JOINERS = "\u200c\u200d"
"""Persian and emoji are spelled with these two."""
_FIRST_STRONG, _POP = "\u2068", "\u2069"


def visible(text: str) -> str:
    """``text`` on one line, with every control and formatting character as its escape: ``\\x1b``, ``\\u202e``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if _acts(c) else c for c in text)


def counted(n: int, noun: str) -> str:
    """``n`` of what ``noun`` names: "1 picture", "3 pictures"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def isolated(text: str) -> str:
    """`visible`, and where it is written from right to left, kept from turning around what stands beside it."""
    text = visible(text)
    turns = any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text)
    return f"{_FIRST_STRONG}{text}{_POP}" if turns else text


def shown(data: Any) -> Any:
    """All texts in ``data`` (dataclasses, mappings with their keys, lists, tuples) made `visible`."""
    if isinstance(data, str):
        return visible(data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        fields = {f.name: shown(getattr(data, f.name)) for f in dataclasses.fields(data) if f.init}
        return dataclasses.replace(data, **fields)
    if isinstance(data, Mapping):
        return {shown(k): shown(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(map(shown, data))
    return data


def plain(text: str) -> str:
    """``text`` for Markdown: `visible`, with nothing in it that is markup, HTML included."""
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    marked = re.sub(r"[&<>]", lambda m: entities[m[0]], visible(text))
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", marked)


def _acts(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in _JOINERS


def _escape(c: str) -> str:
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(c) or (
        f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}"
    )
