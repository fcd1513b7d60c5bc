"""What a setting may be, said in its type: ``batch: Count = 4``, ``lr: Positive = 1e-3``, ``share: Share = 0.1``.

From it come the refusal of all else, in Python and on the command line, and the range in the help.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from sfumato.errors import BadInput, unknown


@dataclass(frozen=True)
class Bound:
    """The numbers from ``low`` to ``high``; an open end is not one of them."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        return above and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        high = f"{'less than' if self.open_high else 'at most'} {self.high:g}"
        return " and ".join([low] * math.isfinite(self.low) + [high] * math.isfinite(self.high))


def at_least(low: float) -> Bound:
    """``low`` and all above it."""
    return Bound(low)


def more_than(low: float) -> Bound:
    """All above ``low``."""
    return Bound(low, open_low=True)


def within(low: float, high: float) -> Bound:
    """All from ``low`` to ``high``, both included."""
    return Bound(low, high)


def below(low: float, high: float) -> Bound:
    """All from ``low`` on, ``high`` not included."""
    return Bound(low, high, open_high=True)


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Positive = Annotated[float, more_than(0)]
NotNegative = Annotated[float, at_least(0)]
Share = Annotated[float, within(0, 1)]
Decay = Annotated[float, below(0, 1)]
Seed = Annotated[int, below(0, 2**63)]
Temperature = Annotated[float, at_least(1e-6)]
"""Of logits: divided by much less, they are no numbers of 32 bits any more."""


def check(settings: Any) -> None:
    """Refuse a dataclass of which a field is not what its type says. Where there may be any number of values they
    become a tuple, and one alone a tuple of it: ``forbidden="star"`` is a word and not four letters.

    Raises:
        BadInput: names the field, what it may be, and what it is.
    """
    kind: Any = type(settings)
    hints, values = hints_of(kind), {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        values[field.name] = several = _several(hints.get(field.name, Any), value)
        if several is not value:
            object.__setattr__(settings, field.name, several)
    check_values(hints, values)


def check_values(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """`check` for values by name; one whose type says nothing of numbers, choices or texts may be anything."""
    for name, value in values.items():
        _check(name, hints.get(name, Any), value)


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their bounds."""
    return typing.get_type_hints(cls, include_extras=True)


def plain(hint: Any) -> tuple[Any, str]:
    """A type without its bounds, and the bounds in words."""
    told = ", ".join(dict.fromkeys(str(bound) for bound in _bounds(hint)))
    return _without(hint), told


def _bounds(hint: Any) -> Iterator[Bound]:
    if typing.get_origin(hint) is Annotated:
        yield from (x for x in hint.__metadata__ if isinstance(x, Bound))
    for part in typing.get_args(hint):
        if typing.get_origin(hint) is not Literal:
            yield from _bounds(part)


def _without(hint: Any) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rest = tuple(x for x in hint.__metadata__ if not isinstance(x, Bound))
        inner = _without(parts[0])
        return Annotated[(inner, *rest)] if rest else inner
    if origin in (types.UnionType, typing.Union):
        made = _without(parts[0])
        for part in parts[1:]:
            made = made | _without(part)
        return made
    if origin is tuple:
        return types.GenericAlias(tuple, tuple(p if p is ... else _without(p) for p in parts))
    return hint


def _several(hint: Any, value: Any) -> Any:
    """The value, as a tuple where its field takes any number of values and nothing else but None."""
    if value is None or isinstance(value, (tuple, Mapping)) or hasattr(value, "shape"):
        return value
    hint = _without(hint)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    others = [p for p in parts if p is not types.NoneType]
    if not all(typing.get_origin(p) is tuple and typing.get_args(p)[1:] == (...,) for p in others):
        return value
    return (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)


def _check(name: str, hint: Any, value: Any) -> None:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        wrong = None
        for part in parts:
            try:
                return _check(name, part, value)
            except BadInput as error:
                wrong = wrong or (None if part is types.NoneType else error)
        raise wrong or BadInput(f"{name} cannot be {value!r}")
    if origin is Annotated:
        _check(name, parts[0], value)
        for bound in (x for x in hint.__metadata__ if isinstance(x, Bound)):
            if value not in bound:
                raise BadInput(f"{name} must be {bound}, got {value}")
    elif origin is Literal:
        if value not in parts:
            raise unknown(name, str(value), map(str, parts))
    elif origin is tuple and isinstance(value, (tuple, list)):
        kinds = [parts[0]] * len(value) if parts[1:] == (...,) else parts
        if len(kinds) != len(value):
            raise BadInput(f"{name} takes {len(kinds)} values, got {len(value)}")
        for kind, x in zip(kinds, value, strict=True):
            _check(name, kind, x)
    elif origin is tuple and (isinstance(value, str) or not isinstance(value, Iterable)):
        if parts[1:] != (...,):
            raise BadInput(f"{name} takes {len(parts)} values, got {value!r}")
        _check(name, parts[0], value)  # one alone, on the command line
    elif hint is types.NoneType:
        if value is not None:
            raise BadInput(f"{name} cannot be {value!r}")
    elif hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if hint is int else (int, float)):
            raise BadInput(f"{name} must be a {'whole ' if hint is int else ''}number, got {value!r}")
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number that no float can be
            raise BadInput(f"{name} must be a number below 1e308, got one of {value.bit_length()} bits") from None
        if not finite:
            raise BadInput(f"{name} must be a finite number, got {value}")
    elif hint in (str, Path) and value is None:
        raise BadInput(f"{name} is missing: give it a value")
    elif hint in (str, Path) and isinstance(value, (int, float)):
        raise BadInput(f"{name} must be text, got {value!r}")
