"""The list of methods: what each is called, where it lives, which papers it carries out and what it costs.

One file a verb, and the papers in ``papers.bib``. It is read by the command line, the documentation and the tests, and
imports none of the methods. A new method is one entry in its verb's file (and one file, one test file, one ledger
entry).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sfumato.errors import unknown

from . import attack, attribute, classify, customize, distill, edit, erase, explain, protect, sample, steer, train
from .method import Method

if TYPE_CHECKING:
    from typing import Any

    from .papers import Paper

METHODS: tuple[Method, ...] = (
    *erase.METHODS, *attack.METHODS, *steer.METHODS, *edit.METHODS, *customize.METHODS, *protect.METHODS,
    *distill.METHODS, *train.METHODS, *sample.METHODS, *attribute.METHODS, *classify.METHODS, *explain.METHODS,
)  # fmt: skip

CITED = {"audit": ("schioppa2024integrity",)}
"""Papers of what is a command of its own, beside those of the methods that it runs."""


def verbs() -> tuple[str, ...]:
    """The verbs that have methods, in the order of the list."""
    return tuple(dict.fromkeys(method.verb for method in METHODS))


def methods(verb: str | None = None) -> tuple[Method, ...]:
    """All methods, or those of one verb."""
    return tuple(method for method in METHODS if verb in (None, method.verb))


def get(name: str, verb: str | None = None) -> Method:
    """The method called ``name``; `BadInput` with the nearest names when there is none."""
    by_name = {method.name: method for method in methods(verb)}
    if name.lower() not in by_name:
        raise unknown(f"{verb} method" if verb else "method", name, by_name)
    return by_name[name.lower()]


def cite(name: str) -> tuple[Paper, ...]:
    """The papers of a method, or of a command that has its own; `BadInput` with the nearest names for another word."""
    from .papers import papers

    if name in CITED:
        return tuple(papers()[key] for key in CITED[name])
    return get(name).papers


def exports(verb: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a verb's package: its classes, imported when they are first used."""
    classes = {method.class_name: method for method in methods(verb)}

    def __getattr__(name: str) -> Any:
        if name not in classes:
            raise AttributeError(f"module 'sfumato.{verb}' has no attribute {name!r}")
        return classes[name].load()

    def __dir__() -> list[str]:
        return sorted(classes)

    return __getattr__, __dir__
