"""``sfumato erase METHOD``: take a concept out of a model."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import catalog
from sfumato.commands.verb import EMBEDDED, Where, load, provenance, read
from sfumato.errors import unknown
from sfumato.files import refuse_existing
from sfumato.plan import Plan, human_time

if TYPE_CHECKING:
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
    plan(entry, method, pipe, [f"{options.out}/ (a diffusers folder)"]).show()
    erased, cost = erase(method, pipe)
    record = {**provenance(entry, method, pipe, options.model), "cost": cost}
    erased.save(options.out, overwrite=options.overwrite, provenance=record)
    print(f"erased {', '.join(method.concepts)} in {human_time(cost['seconds'])}: {options.out}")


def erase(method: Any, pipe: Text2Image) -> tuple[Text2Image, dict[str, float | None]]:
    """The erased pipeline, and what it cost: seconds, peak memory of the process, parameters changed."""
    import torch

    start = time.perf_counter()
    erased = method.apply(pipe)
    seconds = time.perf_counter() - start
    before, after = pipe.parameters("full"), erased.parameters("full")
    changed = sum(p.numel() for name, p in after.items() if not torch.equal(p, before[name]))
    cost = {
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(pipe),
        "parameters_changed": changed,
        "parameters_total": sum(p.numel() for p in before.values()),
    }
    return erased, cost


def plan(entry: catalog.Method, method: Any, pipe: Text2Image, writes: list[str]) -> Plan:
    """The method's own plan where it makes one, otherwise the weights and the catalogue's words."""
    if hasattr(method, "plan"):
        return replace(method.plan(pipe), writes=writes)
    weights = sum(pipe.describe(weights=False)["parameters"].values()) * pipe.dtype.itemsize
    title = f"{entry.verb} {entry.name}: {', '.join(getattr(method, 'concepts', ()))}"
    return Plan(title, memory={"weights": weights}, time=entry.cost, writes=writes)


def check_words(model: str, concepts: tuple[str, ...]) -> None:
    """Refuse concepts of which the embedded model's world has no word; other models know any word."""
    if model not in EMBEDDED:
        return
    from sfumato.data import sketch

    words = [*sketch.OBJECTS, *sketch.COLOURS, *sketch.BACKGROUNDS, *sketch.STYLES]
    known = {part for word in words for part in word.split()}
    for concept in concepts:
        if not known & set(concept.lower().split()):
            raise unknown("concept of the sketch world", concept, words)


def peak_memory(pipe: Text2Image) -> int | None:
    """Peak bytes on the GPU that holds ``pipe``, otherwise of this process (not known on Windows)."""
    if pipe.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(pipe.device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
