"""``--with "METHOD --flags"``: several methods of steer that act together, in the order in which they are named."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sfumato import catalog
from sfumato.commands.verb import method_of
from sfumato.errors import BadInput, unknown

if TYPE_CHECKING:
    from sfumato.pipeline import Model
    from sfumato.steer.base import Patch

    Named = tuple[catalog.Method, Patch]


def named(words: Sequence[str], model: str) -> list[Named]:
    """The patches that ``--with`` asks for, each a method of steer and its flags in one word.

    Raises:
        BadInput: an unknown method or flag.
    """
    return [_named(text, model) for text in words]


def _named(text: str, model: str) -> Named:
    try:
        name, *args = shlex.split(text) or [""]
    except ValueError as error:
        raise BadInput(f"--with {text!r} cannot be read: {error}") from error
    known = [m.name for m in catalog.methods("steer")]
    if name not in known:
        told = unknown("method of steer", name, known)
        example = f'--with "{known[0]} --flag 1"'
        raise BadInput(f"{told}; a method and its flags are one word, as in {example}, and prompts stand before it")
    return method_of("steer", name, args, model, f"--with {name}")[:2]


def refuse_twice(patches: Sequence[Named]) -> None:
    """Raise `BadInput` where one method is named twice, which cannot act twice."""
    names = [entry.name for entry, _ in patches]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadInput(f"{', '.join(sorted(twice))} is asked for twice: name each method once")


@contextmanager
def acting(model: Model, patches: Sequence[Named]) -> Iterator[list[Mapping[str, Any]]]:
    """All of them in a block, entered in their order; gives what each has to say so far."""
    with ExitStack() as stack:
        yield [stack.enter_context(patch.patch(model)) for _, patch in patches]


def told(patches: Sequence[Named], logs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The methods, how each was set and what each had to say, for the record."""
    return [
        {"name": entry.name, "verb": entry.verb, "paper": str(entry.paper), "configuration": asdict(patch),
         "log": dict(log)}
        for (entry, patch), log in zip(patches, logs, strict=True)
    ]  # fmt: skip
