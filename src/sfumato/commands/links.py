"""From words to the links of a chain: ``distill multistep-cm --updates 200``, ``cast float16``, ..."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato import catalog
from sfumato.commands.options import STEPS, flags_of, parse
from sfumato.commands.verb import method_of, origin
from sfumato.errors import BadInput, unknown
from sfumato.settings import settings_for

if TYPE_CHECKING:
    from sfumato.audit.chain import Link

VERBS = ("erase", "distill", "steer", "customize")
KINDS = {"finetune": "FineTune", "merge": "Merge", "cast": "Cast", "scheduler": "Scheduler", "export": "Export",
         "adapter": "Attach"}  # fmt: skip
_BETWEEN = re.compile(rf",(?=\s*(?:{'|'.join([*VERBS, *KINDS])})\b)")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a link of customize needs beyond its method."""

    images: Path
    """A folder of pictures of what is to be learned."""


def links_of(words: Sequence[str], model: str) -> list[Link]:
    """The links that are asked for, each with the settings that suit the model.

    Args:
        words: each one link or several with commas between them: a verb, a method and its flags, or a kind of link, a
            value and flags; a colon may stand for the first blank ("distill:multistep-cm,cast:bfloat16").
        model: name of the original model.

    Raises:
        BadInput: an unknown link, method or flag.
    """
    asked = [piece.strip() for word in words for piece in _BETWEEN.split(word)]
    return [_link(text, model) for text in asked if text]


def _link(text: str, model: str) -> Link:
    from sfumato.audit import chain

    try:
        kind, *args = shlex.split(re.sub(r"^(\w+):", r"\1 ", text))
    except ValueError as error:
        raise BadInput(f"the link {text!r} cannot be read: {error}") from error
    if kind in VERBS:
        return _method(kind, args, model)
    if kind not in KINDS:
        raise unknown("link", kind, [*VERBS, *KINDS])
    cls = getattr(chain, KINDS[kind])
    if args and not args[0].startswith("-"):  # the first value needs no flag
        args = ["--" + flags_of(cls)[0].name.replace("_", "-"), *args]
    [values] = parse(f"the link {kind}", args, cls, defaults=settings_for(cls, origin(model)))
    return cls(**values)


def _method(verb: str, args: Sequence[str], model: str) -> Link:
    from sfumato.audit.chain import By

    if not args or args[0].startswith("-"):
        names = ", ".join(m.name for m in catalog.methods(verb))
        raise BadInput(
            f"the link {verb} needs a method, as in {verb}:{catalog.methods(verb)[0].name}; there are {names}"
        )
    more = (Pictures,) if verb == "customize" else ()
    _, method, rest = method_of(verb, args[0], args[1:], model, f"the link {verb} {args[0]}", *more, aliases=STEPS)
    return By(method, **(rest[0] if rest else {}))
