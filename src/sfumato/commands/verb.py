"""What the verbs share: ``sfumato VERB METHOD [options]``, generic over the catalogue."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from sfumato import catalog
from sfumato.commands.options import parse
from sfumato.commands.tables import show_table
from sfumato.errors import BadInput, unknown

if TYPE_CHECKING:
    import torch

    from sfumato.pipeline import ImageModel, Text2Image

EMBEDDED = ("sketch",)
"""Models inside the package."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """Where a model runs."""

    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the weights; by default float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equipped(Where):
    """Where a model runs, and what is attached to it."""

    adapters: tuple[str, ...] = ()
    """Adapter files of `erase spm`, or folders that hold one, to attach to the model; it must be the one that they
    were made from, or a fine-tune of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Named settings of a method, as its class lists them in ``presets``."""

    preset: str | None = None
    """Named settings; single flags override them."""


def read(
    verb: str, args: Sequence[str], options: type, example: str, aliases: Mapping[str, str] | None = None
) -> tuple[catalog.Method, Any, Any]:
    """The catalogue's entry, the method as configured by its flags, and the verb's own options.

    Args:
        verb: the verb, as in the catalogue.
        args: the command line after the verb.
        options: dataclass of the verb's own options; the method's fields come on top.
        example: a command line to copy, with ``{name}`` for the method's name.
        aliases: other names of flags, as for `parse`.
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
    copied = example.format(name=entry.name)
    about = f"Example: {copied}\n\n{entry.summary}\n\n{entry.paper}\n\nCost: {entry.cost}."
    command = f"sfumato {verb} {entry.name}"
    presets = entry.presets
    settings, listed = _preset(command, args[1:], presets, options)
    if presets:
        about += f"\n\nPresets: {listed}."
    sources = (cls, options, Preset) if presets else (cls, options)
    # a person at a terminal wants to see a long run move; in Python the caller decides
    defaults = {"progress": True, **settings}
    given, chosen, *_ = parse(command, args[1:], *sources, about=about, defaults=defaults, aliases=aliases)
    return entry, cls(**given), options(**chosen)


def _preset(
    command: str, args: Sequence[str], presets: Mapping[str, Mapping], options: type
) -> tuple[Mapping, str]:
    """The settings that ``args`` choose, and the names to choose from.

    A preset named like the (original) model is chosen for it unasked: published settings suit models a
    hundred times the size of the embedded one.
    """
    own = {field.name: field.default for field in dataclasses.fields(options)}
    of = next((name for name in ("original", "teacher") if name in own), "model")
    words: dict[str, Any] = dict(pairwise(args)) | dict(a.split("=", 1) for a in args if "=" in a)
    # pictures from elsewhere say nothing of which model they belong to
    model = words.get(f"--{of}", None if "--images" in words else own.get(of))
    name = words.get("--preset") or (model if model in presets else None)
    if name is not None and not presets:
        raise BadInput(f"{command} has no presets: leave out --preset")
    if name is not None and name not in presets:
        raise unknown(f"preset of {command}", name, presets)
    listed = [f"{known} (the default for that model)" if known in EMBEDDED else known for known in presets]
    return presets.get(name, {}), ", ".join(listed)


def load_any(model: str, where: Where) -> Text2Image | ImageModel:
    """The model, on the wanted device and in the wanted precision.

    Raises:
        BadInput: as `sfumato.load`.
    """
    from sfumato.pipeline import load

    return load(model, device=where.device, dtype=dtype_of(where))


def dtype_of(where: Where) -> torch.dtype | None:
    """The wanted precision as torch's."""
    import torch

    return getattr(torch, where.dtype) if where.dtype else None


def load(model: str, where: Where) -> Text2Image:
    """The text-to-image model, on the wanted device and in the wanted precision.

    Raises:
        BadInput: as `sfumato.load`; a model that takes no text.
    """
    from sfumato.pipeline import load_text2image

    return load_text2image(model, device=where.device, dtype=dtype_of(where))


def load_equipped(model: str, options: Equipped) -> Text2Image:
    """`load`, with the adapters attached."""
    from sfumato.pipeline.membrane import equip

    return equip(load(model, options), model, options.adapters)


def equipped(found: Text2Image | ImageModel, model: str, options: Equipped) -> Text2Image | ImageModel:
    """The model ``found`` under the name ``model``, with the adapters attached that the options ask for."""
    from sfumato.pipeline import Text2Image
    from sfumato.pipeline.membrane import equip

    if isinstance(found, Text2Image):
        return equip(found, model, options.adapters)
    if options.adapters:
        raise BadInput(f"{model} draws pictures without text: leave --adapters out")
    return found


def provenance(entry: catalog.Method, method: Any, parent: Text2Image, model: str) -> dict[str, Any]:
    """How an output was made: enough to make it again."""
    return {
        "command": shlex.join(["sfumato", *sys.argv[1:]]),
        "method": {"name": entry.name, "verb": entry.verb, "paper": str(entry.paper)},
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
