"""What a flag takes, and what is wrong with what it was given, in words."""

from __future__ import annotations

import re
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from sfumato.errors import BadInput, unknown

_KINDS = {int: "whole number", float: "number", Path: "path", str: "word", bool: "yes or no"}
LONGEST = 400
"""Characters of a sentence that came from elsewhere."""


def takes(kind: Any) -> str:
    """What may be written for a type: "a whole number", "2 numbers", "one of a, b"; None goes without saying."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(takes(part) for part in parts if part is not types.NoneType))
    if origin is Annotated:
        return takes(parts[0])
    if choices := choices_of(kind):
        return f"one of {', '.join(choices)}"
    if origin is tuple:
        told = _KINDS.get(parts[0], "value") + "s"
        return told if parts[1:] == (...,) else f"{len(parts)} {told}"
    return f"a {_KINDS.get(kind, 'value')}"


def choices_of(kind: Any) -> list[str]:
    """The words to choose from, of a type that has such and may be None besides."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return list(map(str, parts))
    if origin in (types.UnionType, typing.Union) and len(rest := [p for p in parts if p is not types.NoneType]) == 1:
        return choices_of(rest[0])
    return [member.name for member in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []


def placeholder(kind: Any) -> str | None:
    """What help shows in the place of a value that may be left out; None: the parser's own."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        told = [placeholder(p) or getattr(p, "__name__", "value").upper() for p in parts if p is not types.NoneType]
        return "|".join(dict.fromkeys(told))
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin is tuple and parts[1:] == (...,):
        name = placeholder(parts[0]) or parts[0].__name__.upper()
        return f"[{name} [{name} ...]]"
    return " ".join(part.__name__.upper() for part in parts) if origin is tuple else None


def refusal(panel: str, command: str, args: Sequence[str], flags: Iterable[tuple[set[str], Any]]) -> BadInput:
    """The parser's complaint, a panel, as one sentence that says what would do; ``flags`` as (spellings, type)."""
    words = " ".join(_above_the_rule(panel)).rstrip(".")
    see = f"see {command} --help"
    if match := re.match(r"Unrecognized options: (.*)", words):
        return BadInput(f"{command} has no place for {match[1]!r}: quote what belongs together, or {see}")
    spelled = {name: flag for flag in flags for name in flag[0]}
    option = next((name for name in re.findall(r"--[\w-]+", words) if name in spelled), None)
    if option is not None:
        spellings, kind = spelled[option]
        given = _given(args, spellings)
        if not given:
            return BadInput(f"{option} takes {takes(kind)}, and nothing follows it: {see}")
        if (choices := choices_of(kind)) and len(given) == 1:
            return unknown(option, given[0], choices)
        got = " ".join(map(repr, given)) if len(given) < 4 else f"{given[0]!r} and {len(given) - 1} more"
        return BadInput(f"{option} takes {takes(kind)}, got {textwrap.shorten(got, 120)}: {see}")
    return BadInput(f"{textwrap.shorten(words, LONGEST - len(see))}: {see}")


def unmarked(text: str) -> str:
    """Docstrings' backquotes as a terminal shows them: a command in quotation marks, a name as it is."""
    quoted = lambda m: f'"{m[1]}"' if " " in m[1] else m[1]
    return re.sub(r"`([^`]*)`", quoted, text.replace("``", "`"))


def _given(args: Sequence[str], spellings: set[str]) -> list[str]:
    """The values behind the last occurrence of an option."""
    given: list[str] = []
    inside = False
    for arg in args:
        option, equals, value = arg.partition("=")
        if arg.startswith("--"):
            inside = option.replace("_", "-") in spellings
            given = ([value] if equals else []) if inside else given
        elif inside:
            given.append(arg)
    return given


def _above_the_rule(panel: str) -> list[str]:
    lines = [line.strip("│ ") for line in panel.splitlines() if not line.startswith(("╭", "╰"))]
    end = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    return lines[:end]
