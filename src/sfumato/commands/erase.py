"""``sfumato erase METHOD``: take a concept out of a model."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import catalog
from sfumato.commands.verb import Where, beside, load, origin, provenance, read
from sfumato.errors import unknown
from sfumato.files import refuse_existing
from sfumato.plan import Plan, human_time
from sfumato.progress import alone

if TYPE_CHECKING:
    from sfumato.erase.base import Eraser
    from sfumato.pipeline import Text2Image

EXAMPLE = "sfumato erase {name} --model sketch --concept star --out erased/"


@dataclass(frozen=True, kw_only=True)
class Erase(Where):
    """Options of the verb."""

    model: str = "sketch"
    """An embedded model, a folder written by save_pretrained, or a hub id."""
    out: Path
    """Folder for the erased pipeline, which diffusers loads without this package."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    entry, method, options = read("erase", args, Erase, EXAMPLE)
    refuse_existing(options.out, options.overwrite)
    check_words(options.model, method.concepts)
    pipe = load(options.model, options)
    with beside(options.out, method) as folder:
        writes = [f"{options.out}/ (a diffusers folder)", *([f"{folder}/ (until then: checkpoints)"] if folder else [])]
        if alone():
            plan(entry, method, pipe, writes).show()
        erased, told = erase(method, pipe, folder)
        record = record_of(entry, method, pipe, options.model, told)
        if not alone():
            return
        erased.save(options.out, overwrite=options.overwrite, provenance=record)
    print(f"erased {', '.join(method.concepts)} in {human_time(told['cost']['seconds'])}: {options.out}")
    if "condition_number" in told["log"]:
        print(f"condition number of the normal equations: {told['log']['condition_number']:.3g}")


def erase(method: Eraser, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
    """The erased pipeline, and for its record: ``cost`` (seconds, peak memory of the process, parameters changed)
    and ``log`` (what the method says about how it went)."""
    import torch

    from sfumato.pipeline.timing import peak_memory

    start = time.perf_counter()
    erased, log = method.run(pipe, folder)
    seconds = time.perf_counter() - start
    before, after = pipe.parameters("full"), erased.parameters("full")
    changed = sum(p.numel() for name, p in after.items() if not torch.equal(p, before[name]))
    changed += sum(p.numel() for adapter in erased.adapters.values() for p in adapter.parameters())
    cost = {
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(pipe),
        "parameters_changed": changed,
        "parameters_total": sum(p.numel() for p in before.values()),
    }
    return erased, {"cost": cost, "log": log}


def record_of(
    entry: catalog.Method, method: Eraser, pipe: Text2Image, model: str, told: dict[str, Any]
) -> dict[str, Any]:
    """How an erased pipeline was made; what the method was left to choose stands as it was chosen."""
    record = {**provenance(entry, method, pipe, model), **told}
    chosen = {name: told["log"][name] for name in record["configuration"].keys() & told["log"].keys()}
    return {**record, "configuration": {**record["configuration"], **chosen}}


def plan(entry: catalog.Method, method: Eraser, pipe: Text2Image, writes: list[str]) -> Plan:
    """The method's own plan; where that cannot tell the time, with the catalogue's words."""
    made = method.plan(pipe)
    return replace(made, writes=writes, time=made.time or ("" if made.seconds else entry.cost))


def check_words(model: str, concepts: tuple[str, ...]) -> None:
    """Refuse concepts of which the world of the embedded model, or of what was made from it, has no word.

    Other models know any word.
    """
    if origin(model) is None:
        return
    from sfumato.data.world import WORDS

    words = [word for known in WORDS.values() for word in known]
    known = {part for word in words for part in word.split()}
    for concept in concepts:
        if not known & set(concept.lower().split()):
            raise unknown("concept of the sketch world", concept, words)
