"""What the verbs share: ``sfumato VERB METHOD [options]``, generic over the catalogue."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from sfumato import catalog
from sfumato.commands.options import parse
from sfumato.commands.tables import show_table
from sfumato.errors import BadInput, unknown
from sfumato.progress import alone
from sfumato.settings import EMBEDDED, preset_for, settings_for
from sfumato.versions import versions

if TYPE_CHECKING:
    import torch

    from sfumato.pipeline import Model, Text2Image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """Where a model runs."""

    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the weights; by default float32."""
    prediction: Literal["eps", "v"] | None = None
    """What the network in a single file predicts, where the file does not say it; folders say it."""
    offload: Literal["model", "sequential"] | None = None
    """Keep the weights in the machine's own memory, and bring one part at a time to the accelerator (model), or one
    layer (sequential: slowest, and for drawing only)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equipped(Where):
    """Where a model runs, and what is attached to it."""

    adapters: tuple[str, ...] = ()
    """Files of `customize`, adapter files of `erase spm`, LoRA files, or folders that hold one, to attach to the model;
    it must be the one that they were made from, or a fine-tune of it. FILE:0.8 lets a LoRA act at that strength. Or key
    files of `erase kpop`, for the model that hides what they bring back."""


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
            if verb == "erase":
                from sfumato.commands import choosing

                show_table(choosing.HEADER, choosing.table())
                print("\n".join(choosing.advice()))
            print(f"sfumato {verb} METHOD --help lists a method's options.")
            raise SystemExit(0)
        names = ", ".join(m.name for m in entries)
        raise BadInput(f"name a method right after {verb}: one of {names}, as in `{first}`")
    entry = catalog.get(args[0], verb)
    cls = entry.load()
    copied = example.format(name=entry.name)
    about = f"Example: {copied}\n\n{entry.summary}\n\n{entry.paper}\n\nCost: {entry.cost}."
    if verb == "erase" and {"-h", "--help"} & set(args):
        from sfumato.commands import choosing

        about += f"\n\n{choosing.line(entry)}"
    command = f"sfumato {verb} {entry.name}"
    if not entry.presets and any(arg.partition("=")[0] == "--preset" for arg in args):
        raise BadInput(f"{command} has no presets: leave out --preset")
    sources = (cls, options, Preset) if entry.presets else (cls, options)
    if entry.presets:
        suits = {known: [m for m in EMBEDDED if preset_for(entry.presets, m) == known] for known in entry.presets}
        listed = [f"{known} (the default for {' and '.join(of)})" if of else known for known, of in suits.items()]
        about += f"\n\nPresets: {', '.join(listed)}."

    def reading(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        # a person at a terminal wants to see a long run move; in Python the caller decides
        return parse(command, args[1:], *sources, about=about, defaults={"progress": True, **settings}, aliases=aliases)

    # Which model it is, and with it what suits it, is known when the line has been read: if that is not what was
    # taken for granted, it is read again.
    supposed = _settings(cls, {field.name: field.default for field in dataclasses.fields(options)}, None)
    given, chosen, *rest = reading(supposed)
    preset = rest[0]["preset"] if rest else None
    if preset is not None and preset not in entry.presets:
        raise unknown(f"preset of {command}", preset, entry.presets)
    if (meant := _settings(cls, chosen, preset)) != supposed:
        given, chosen, *_ = reading(meant)
    return entry, cls(**given), options(**chosen)


def method_of(
    verb: str, name: str, args: Sequence[str], model: str, command: str, *more: type,
    aliases: Mapping[str, str] | None = None,
) -> tuple[catalog.Method, Any, list[dict[str, Any]]]:  # fmt: skip
    """The catalogue's entry, the method as its flags alone configure it for ``model``, and the values of ``more``.

    Args:
        command: what complaints call it.
        more: dataclasses of other flags.
        aliases: other names of flags, as for `parse`.
    """
    entry = catalog.get(name, verb)
    cls = entry.load()
    sources = (cls, *more, Preset) if entry.presets else (cls, *more)

    def reading(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        return parse(command, args, *sources, defaults={"progress": True, **settings}, aliases=aliases)

    given, *rest = reading(_settings(cls, {"model": model}, None))
    if entry.presets and (preset := rest.pop()["preset"]) is not None:
        if preset not in entry.presets:
            raise unknown(f"preset of {command}", preset, entry.presets)
        given, *rest = reading(_settings(cls, {}, preset))
    return entry, cls(**given), rest[: len(more)]


def _settings(cls: Any, options: Mapping[str, Any], preset: str | None) -> dict[str, Any]:
    """The preset asked for, or what suits the model that the options name."""
    if preset is not None:
        return dict(cls.presets[preset])
    model = options.get("teacher", options.get("model"))
    return settings_for(cls, origin(model) if isinstance(model, str) else None)


def origin(model: str) -> str | None:
    """The embedded model that ``model`` is or was made from, told without loading it."""
    if model in EMBEDDED and not Path(model).is_dir():
        return model
    from sfumato.pipeline import origin_of

    return origin_of(model)


@contextlib.contextmanager
def beside(out: Path, method: Any) -> Iterator[Path | None]:
    """``OUT.training``, where a method that trains keeps its state until its output is whole; None for all others.

    Killed inside the block, the same command goes on from there; at its end the folder is removed.

    Raises:
        BadInput: another process is at work in it.
    """
    from sfumato.files import held
    from sfumato.train.schedule import Tuning

    if not isinstance(method, Tuning):
        yield None
        return
    folder = out.parent / f"{out.name}.training"
    if not alone():
        yield folder
        return
    with held(folder):
        yield folder
        shutil.rmtree(folder)


def load_any(model: str, where: Where) -> Model:
    """The model, on the wanted device and in the wanted precision.

    Raises:
        BadInput: as `sfumato.load`.
    """
    from sfumato.pipeline import load

    return load(model, where.device, dtype_of(where), where.prediction, where.offload)


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

    return load_text2image(model, where.device, dtype_of(where), where.prediction, where.offload)


def load_equipped(model: str, options: Equipped) -> Text2Image:
    """`load`, with the adapters attached."""
    from sfumato.pipeline.equip import equip

    return equip(load(model, options), model, options.adapters)


def equipped(found: Model, model: str, options: Equipped) -> Model:
    """The model ``found`` under the name ``model``, with the adapters attached that the options ask for."""
    from sfumato.pipeline.equip import equip

    if hasattr(found, "add_adapter"):
        return equip(cast("Text2Image", found), model, options.adapters)
    if options.adapters:
        raise BadInput(f"{model} draws pictures without text: leave --adapters out")
    return found


def provenance(entry: catalog.Method, method: Any, parent: Model, model: str) -> dict[str, Any]:
    """How an output was made: enough to make it again."""
    return {
        "command": shlex.join(["sfumato", *sys.argv[1:]]),
        "method": {"name": entry.name, "verb": entry.verb, "paper": str(entry.paper)},
        "configuration": dataclasses.asdict(method),
        "parent": {"model": os.fspath(model), **parent.describe()},
        "versions": versions(),
    }


def trained(entry: catalog.Method, method: Any, chosen: Any, writes: str) -> Path | None:
    """Train in ``chosen.out``, and show the plan first; None for a run that is finished already.

    Args:
        entry, method, chosen: as `read` gives them; the options have ``out`` and ``overwrite``.
        writes: what will lie in ``out``.
    """
    from sfumato.plan import Plan

    if method.finished(chosen.out, chosen.overwrite):
        if alone():
            print(f"finished already, with these settings: {chosen.out} is left as it is")
        return None
    if alone():
        plan = method.plan() if hasattr(method, "plan") else Plan(f"{entry.verb} {entry.name}")
        timed = plan if plan.seconds is not None or plan.time else dataclasses.replace(plan, time=entry.cost)
        dataclasses.replace(timed, writes=[f"{chosen.out}/ ({writes})"]).show()
    return method.run(chosen.out, overwrite=chosen.overwrite)
