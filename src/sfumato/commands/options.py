"""From dataclasses and functions to command-line flags, by way of tyro.

Every field or argument becomes a flag with its default; its docstring becomes the help. A field that holds
several values (``concepts: tuple[str, ...]``) is also called by its singular and may be repeated:
``--concept a --concept b`` is ``--concepts a b``.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import io
import operator
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from sfumato.errors import BadInput, unknown
from sfumato.fields import check_values, plain

from .words import placeholder, refusal, unmarked

STEPS = {"sampling_steps": "--steps"}
"""What commands that draw call the number of denoising steps too, since they have no other steps."""


@dataclasses.dataclass
class Flag:
    """One option: Python name, type, default (`MISSING` when required), help and spelling.

    A name with an underscore behind it, which Python's own words need, is spelt without: ``with_`` is ``--with``.
    """

    name: str
    type: Any
    default: Any
    doc: str
    option: str = ""
    aliases: tuple[str, ...] = ()
    bounded: Any = None
    """Its type with the bounds of numbers."""

    def __post_init__(self) -> None:
        self.option = "--" + self.name.rstrip("_").replace("_", "-")
        if isinstance(self.default, list):
            self.default = tuple(self.default)

    @property
    def several(self) -> bool:
        """Whether it takes any number of values."""
        parts = typing.get_args(self.type) if isinstance(self.type, types.UnionType) else (self.type,)
        return any(typing.get_origin(p) is tuple and typing.get_args(p)[-1:] == (...,) for p in parts)

    @property
    def positional(self) -> bool:
        return typing.get_origin(self.type) is Annotated

    def spellings(self) -> set[str]:
        if self.positional:
            return set()
        negated = {"--no-" + self.option[2:]} if self.type is bool else set()
        return {self.option, *self.aliases} | negated

    def settings(self) -> Any:
        """How tyro names and explains it."""
        import tyro

        empty = self.default in (None, (), "") or (self.positional and self.default is dataclasses.MISSING)
        return tyro.conf.arg(
            name=self.option[2:] if self.aliases or self.name.endswith("_") else None,
            aliases=self.aliases or None,
            help=unmarked(" ".join(self.doc.split())) or None,
            metavar=placeholder(self.type) if typing.get_origin(self.type) in (types.UnionType, typing.Union) else None,
            help_behavior_hint="" if empty else None,
        )


def parse(
    command: str,
    args: Sequence[str],
    *sources: Any,
    about: str = "",
    defaults: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The values that ``args`` give to each of ``sources`` (dataclasses or functions), defaults filled in.

    A name that several sources share is one flag, described by the first, and is passed to all of them.
    ``defaults`` replace the sources' own; ``aliases`` say by which other name a flag is called too.

    Raises:
        BadInput: what tyro finds wrong, in one sentence.
        SystemExit: after ``--help``.
    """
    import tyro

    described = [flags_of(source) for source in sources]
    flags: dict[str, Flag] = {}
    for flag in chain.from_iterable(described):
        flags.setdefault(flag.name, flag)
    for name, value in (defaults or {}).items():
        if name in flags:
            flags[name].default = value
    _rename(flags, aliases or {})
    args, told = _until_dashes(args)
    args = _gather(args, flags, list(map(_masked, told)))
    _refuse_unknown(command, args, flags)
    fields = []
    for flag in flags.values():
        default = {} if flag.default is dataclasses.MISSING else {"default": flag.default}
        fields.append((flag.name, Annotated[flag.type, flag.settings()], dataclasses.field(**default)))
    combined = dataclasses.make_dataclass("Options", fields, kw_only=True)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            values: Any = tyro.cli(combined, args=args, prog=command, description=unmarked(about))
    except SystemExit as exit:
        if exit.code and complaint.getvalue():  # and not a signal's
            known = [(flag.spellings(), flag.type) for flag in flags.values()]
            raise refusal(complaint.getvalue(), command, args, known) from None
        raise
    for flag in flags.values():
        setattr(values, flag.name, _unmasked(getattr(values, flag.name)))
        check_values({flag.option: flag.bounded}, {flag.option: getattr(values, flag.name)})
    return [{flag.name: getattr(values, flag.name) for flag in source} for source in described]


def flags_of(source: Any) -> list[Flag]:
    """The flags of a dataclass (its init fields) or of a function (its arguments).

    What no word can say, such as an object or a function, is left out and keeps its default.
    """
    hints = typing.get_type_hints(source, include_extras=True)
    if dataclasses.is_dataclass(source):
        docs = field_docs(cast(type, source))
        defaults = {f.name: _default(f) for f in dataclasses.fields(source) if f.init}
    else:
        docs = _argument_docs(source)
        parameters = inspect.signature(source).parameters.values()
        defaults = {p.name: dataclasses.MISSING if p.default is p.empty else p.default for p in parameters}
    flags = []
    for name, default in defaults.items():
        kind, bounds = plain(hints[name])
        doc = docs.get(name, "")
        flags.append(Flag(name, sayable(kind), default, f"{doc} ({bounds})" if bounds else doc, bounded=hints[name]))
    return [flag for flag in flags if flag.type is not None]


def sayable(kind: Any) -> Any:
    """The part of a type that can be written on a command line, or None.

    ``str | Detector | None`` becomes ``str | None``; ``Sequence[str | Attack]`` becomes ``tuple[str, ...]``.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        kept = [part for part in map(sayable, inner) if part is not None and not dataclasses.is_dataclass(part)]
        return functools.reduce(operator.or_, kept) if set(kept) - {types.NoneType} else None
    if origin in (list, collections.abc.Sequence):
        return types.GenericAlias(tuple, (sayable(inner[0]), ...)) if sayable(inner[0]) is not None else None
    if origin is tuple:
        return kind if all(part is ... or sayable(part) is not None for part in inner) else None
    plain = isinstance(kind, type) and issubclass(kind, (str, int, float, Path, types.NoneType, Enum))
    return kind if plain or origin in (Literal, Annotated) or dataclasses.is_dataclass(kind) else None


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal below it, or its entry under ``Attributes:``; base classes first."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        docs |= _argument_docs(base)
        source: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for field, below in pairwise(source.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[field.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return docs


def _argument_docs(source: Callable) -> dict[str, str]:
    from docstring_parser import parse as parse_docstring

    return {p.arg_name: p.description or "" for p in parse_docstring(source.__doc__ or "").params}


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _rename(flags: dict[str, Flag], aliases: Mapping[str, str]) -> None:
    """Call an option that takes several values by its singular, and by its plural too; and others as asked."""
    for flag in flags.values():
        short = flag.name.removesuffix("s")
        if flag.several and not flag.positional and short != flag.name and short not in flags:
            flag.option, flag.aliases = "--" + short.replace("_", "-"), (flag.option,)
        if flag.name in aliases:
            flag.aliases += (aliases[flag.name],)


def _gather(args: Sequence[str], flags: dict[str, Flag], told: list[str]) -> list[str]:
    """``args`` with all values of a repeatable option behind one occurrence of it, and ``told`` beside the other words
    that belong to no option."""
    repeatable = {name: flag.option for flag in flags.values() if flag.several for name in flag.spellings()}
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    into = rest
    for arg in args:
        option, equals, value = arg.partition("=")
        option = option.replace("_", "-") if option.startswith("--") else option  # as the parser reads options
        if arg.startswith("-") and not _is_number(arg):
            into = values.setdefault(repeatable[option], []) if option in repeatable else rest
            if into is not rest:
                into.extend([_masked(value)] if equals else [])
                continue
        into.append(arg)
    return _among(rest, told) + [arg for option, given in values.items() for arg in (option, *given)]


_MASK = "\ue000"
"""Before a word that begins with a dash and is no option; a character without a meaning, which nobody types."""


def _until_dashes(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before a lone ``--``, and those after it, none of which is an option."""
    at = args.index("--") if "--" in args else len(args)
    return list(args[:at]), list(args[at + 1 :])


def _among(args: list[str], told: list[str]) -> list[str]:
    """``args`` with ``told`` after the words that it begins with, or at its end: the parser wants them side by side."""
    first = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args)) or len(args)
    return [*args[:first], *told, *args[first:]]


def _masked(word: str) -> str:
    return _MASK + word if word.startswith("-") and not _is_number(word) else word


def _unmasked(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_unmasked, value))
    return type(value)(str(value).removeprefix(_MASK)) if isinstance(value, (str, Path)) else value


def _is_number(arg: str) -> bool:
    try:
        float(arg)
    except ValueError:
        return False
    return True


def _refuse_unknown(command: str, args: list[str], flags: dict[str, Flag]) -> None:
    known = {"--help"}.union(*(flag.spellings() for flag in flags.values()))
    options = [arg for arg in args if arg.startswith("-") and not _is_number(arg)]
    given = {option.partition("=")[0].replace("_", "-") for option in options}
    for option in given:
        # a dotted option belongs to a nested dataclass, which tyro knows better
        if option not in known | {"-h"} and ("." not in option or " " in option):
            words = any(flag.positional for flag in flags.values())
            told = "; a word that begins with a dash goes after all options and a lone --" if words else ""
            if " " in option:
                raise BadInput(f"{option!r} is no option of {command}{told or f': see {command} --help'}")
            raise BadInput(f"{unknown(f'option of {command}', option, sorted(known))}{told}")
    if given & {"-h", "--help"}:
        return
    for flag in flags.values():
        if flag.default is dataclasses.MISSING and not flag.positional and not given & flag.spellings():
            raise BadInput(f"{command} needs {flag.option}: {unmarked(flag.doc) or 'it has no default'}")
