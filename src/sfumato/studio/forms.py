"""From a dataclass to a form, and from what was filled in to the words of a command line."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sfumato.commands.options import Flag, flags_of
from sfumato.commands.words import choices_of, takes, unmarked

ELSEWHERE = ("progress", "track", "out", "overwrite")
"""Fields that a studio answers by itself."""

Kind = Literal["tick", "choice", "choices", "line", "lines"]


@dataclass(frozen=True)
class Field:
    """One entry of a form; it knows nothing of the library that draws it.

    Attributes:
        name: of the dataclass's field.
        option: how the command line calls it.
        help: its docstring and what may be written, as plain text.
        kind: a tick, one or several of ``choices``, a line of text, or a line for each value.
        value: what it shows at first: a bool, a list for several choices, else text; empty for nothing.
        choices: to choose from.
        required: whether it has no default.
        nothing: whether it may be None.
        numbers: whether a line of it holds several values.
    """

    name: str
    option: str
    help: str
    kind: Kind
    value: Any
    choices: tuple[str, ...] = ()
    required: bool = False
    nothing: bool = False
    numbers: bool = False

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")


def fields_of(
    source: Any, defaults: Mapping[str, Any] | None = None, leave: Iterable[str] = (), only: Iterable[str] = ()
) -> list[Field]:
    """The form of a dataclass, as `flags_of` reads it for the command line.

    Args:
        source: the dataclass.
        defaults: instead of its own, such as those that suit a model.
        leave: fields that are not asked for, beside `ELSEWHERE` and words that stand without an option.
        only: the fields to take, in this order; none: all.
    """
    left = {*ELSEWHERE, *leave}
    found = {f.name: f for f in flags_of(source) if f.name not in left and not f.positional}
    wanted = [found[name] for name in only] if only else list(found.values())
    return [_field(flag, (defaults or {}).get(flag.name, flag.default)) for flag in wanted]


def words(fields: Sequence[Field], values: Sequence[Any]) -> list[str]:
    """The options that say what was filled in; what stands as it was shown at first goes without saying."""
    return [word for field, value in zip(fields, values, strict=True) for word in _words(field, value)]


def lines(text: str | None) -> list[str]:
    """What stands on lines of its own, without empty ones."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def named(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words without an option, as they go before all options, or after them where one begins with a dash."""
    odd = any(prompt.startswith("-") for prompt in prompts)
    return ([], ["--", *prompts]) if odd else (list(prompts), [])


def _field(flag: Flag, default: Any) -> Field:
    bare = _bare(flag.type)
    nothing = types.NoneType in typing.get_args(flag.type)
    required = default is dataclasses.MISSING
    default = None if required else default
    parts = typing.get_args(bare) if typing.get_origin(bare) is tuple else ()
    told = unmarked(" ".join(flag.doc.split()))
    about: dict[str, Any] = {"required": required, "nothing": nothing}
    if flag.type is bool:
        return Field(flag.name, flag.option, told, "tick", bool(default), **about)
    if choices := choices_of(flag.type):
        value = "" if default is None else getattr(default, "name", None) or str(default)
        return Field(flag.name, flag.option, told, "choice", value, ("", *choices) if nothing else (*choices,), **about)
    if parts[1:] == (...,) and (choices := choices_of(parts[0])):
        return Field(flag.name, flag.option, told, "choices", list(default or ()), tuple(choices), **about)
    many = parts[1:] == (...,) and parts[0] not in (int, float)
    kind: Kind = "lines" if many else "line"
    written = "One a line." if many else "" if (what := takes(flag.type)) == "a word" else f"{what.capitalize()}."
    value = _text(default, "\n" if many else " ")
    return Field(flag.name, flag.option, f"{told} {written}".strip(), kind, value, numbers=len(parts) > 0, **about)


def _bare(kind: Any) -> Any:
    """A type that may be None, without that."""
    if isinstance(kind, types.UnionType) and len(rest := [p for p in kind.__args__ if p is not types.NoneType]) == 1:
        return rest[0]
    return kind


def _text(value: Any, between: str) -> str:
    if isinstance(value, (tuple, list)):
        return between.join(map(str, value))
    return "" if value is None else str(value)


def _words(field: Field, value: Any) -> list[str]:
    if field.kind == "tick":
        if bool(value) == field.value:
            return []
        return [field.option if value else f"--no-{field.option[2:]}"]
    if field.kind == "choices":
        chosen = [str(x) for x in value or ()]
        return [] if chosen == [str(x) for x in field.value] else [field.option, *chosen]
    text = str(value if value is not None else "").strip()
    if text == str(field.value).strip():
        return []
    if not text:
        # a field that was emptied: none of it, where that can be said; else it stays as it was
        return [field.option, "None"] if field.nothing else [field.option] if field.kind == "lines" else []
    if field.kind == "lines":
        return _several(field.option, lines(text))
    if field.numbers:
        return [field.option, *text.replace(",", " ").split()]
    return _several(field.option, [text])


def _several(option: str, told: list[str]) -> list[str]:
    plain = [word for word in told if not word.startswith("-")]
    dashed = [f"{option}={word}" for word in told if word.startswith("-")]
    return [*([option, *plain] if plain else []), *dashed]
