"""What the verbs share: ``sfumato VERB METHOD [options]``, generic over the catalogue."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from sfumato import catalog
from sfumato.commands.options import parse
from sfumato.commands.tables import show_table
from sfumato.errors import BadInput

if TYPE_CHECKING:
    from sfumato.pipeline import Text2Image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """Where a model runs."""

    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the weights; by default the model's own."""


def read(verb: str, args: Sequence[str], options: type, example: str) -> tuple[catalog.Method, Any, Any]:
    """The catalogue's entry, the method as configured by its flags, and the verb's own options.

    Args:
        verb: the verb, as in the catalogue.
        args: the command line after the verb.
        options: dataclass of the verb's own options; the method's fields come on top.
        example: a command line to copy, with ``{name}`` for the method's name.
    """
    entries = catalog.methods(verb)
    first = example.format(name=entries[0].name)
    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            print(f"usage: sfumato {verb} METHOD [options]\n\nExample: {first}\n")
            rows = [(m.name, m.paper.arxiv, m.summary) for m in entries]
            show_table(("method", "paper", "what it does"), rows)
            print(f"`sfumato {verb} METHOD --help` lists a method's options.")
            raise SystemExit(0)
        names = ", ".join(m.name for m in entries)
        raise BadInput(f"name a method right after {verb}: one of {names}, as in `{first}`")
    entry = catalog.get(args[0], verb)
    cls = entry.load()
    about = f"Example: {example.format(name=entry.name)}\n\n{entry.summary}\n{entry.paper}\nCost: {entry.cost}."
    given, chosen = parse(f"sfumato {verb} {entry.name}", args[1:], cls, options, about=about)
    return entry, cls(**given), options(**chosen)


def load(model: str, where: Where) -> Text2Image:
    """The model, on the wanted device and in the wanted precision."""
    import torch

    from sfumato.pipeline import load

    return load(model, device=where.device, dtype=getattr(torch, where.dtype) if where.dtype else None)


def provenance(entry: catalog.Method, method: Any, parent: Text2Image, model: str) -> dict[str, Any]:
    """How an output was made: enough to make it again."""
    return {
        "command": shlex.join(["sfumato", *sys.argv[1:]]),
        "method": {"verb": entry.verb, "name": entry.name, "paper": str(entry.paper)},
        "configuration": dataclasses.asdict(method),
        "parent": {"model": os.fspath(model), **parent.describe()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    import platform
    from importlib.metadata import version

    from sfumato import __version__

    names = ("torch", "diffusers", "transformers", "safetensors", "numpy")
    return {"sfumato": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}
