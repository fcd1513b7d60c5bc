"""``sfumato erase METHOD``: take a concept out of a model."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato import catalog
from sfumato.commands.verb import Where, beside, load_any, origin, provenance, read
from sfumato.errors import BadInput, unknown
from sfumato.files import refuse_existing
from sfumato.plan import Plan, human_bytes, human_time
from sfumato.progress import alone
from sfumato.text import visible
from sfumato.versions import versions

if TYPE_CHECKING:
    from sfumato.erase.base import Eraser
    from sfumato.pipeline import Model

EXAMPLE = "sfumato erase {name} --model sketch --concept star --out erased/"


@dataclass(frozen=True, kw_only=True)
class Erase(Where):
    """Options of the verb."""

    model: str = "sketch"
    """An embedded model, a folder written by save_pretrained, a .safetensors file of SD 1.x, 2.x or XL, or a hub id."""
    out: Path
    """Folder for the erased model; a pipeline loads in diffusers without this package."""
    overwrite: bool = False
    """Replace the output if it exists."""
    component_wise: Literal["auto", "always", "never"] = "auto"
    """Read and write only the weights that a closed-form method changes, in the precision of the files, and link the
    other files; the record then has no hash of all weights. "auto": where a folder's weights need more than half of the
    free memory."""


def main(args: list[str]) -> None:
    entry, method, options = read("erase", args, Erase, EXAMPLE)
    refuse_existing(options.out, options.overwrite)
    check_words(options.model, method.concepts)
    if component_wise(method, options):
        return in_folder(entry, method, options)
    pipe = load_any(options.model, options)
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
    for label, words in told["log"].get("found", {}).items():
        print(visible(f"{label}: {', '.join(words)}"))


def component_wise(method: Eraser, options: Erase) -> bool:
    """Whether only the weights concerned are to be read: as asked, or where all of them would be too many.

    Not always where it can be: who can load the model has the hashes of all weights in the record, and a folder that
    shares no file with the original.

    Raises:
        BadInput: it was asked for, and cannot be.
    """
    from sfumato.erase.parts.edit import ClosedForm

    asked = options.component_wise
    if asked == "never" or (asked == "auto" and not Path(options.model).expanduser().is_dir()):
        return False
    odd = [f"--{name}" for name in ("dtype", "prediction", "offload") if getattr(options, name) is not None]
    odd += ["--device"] if options.device not in (None, "cpu") else []
    fits = isinstance(method, ClosedForm) and not odd
    if asked == "auto":
        return fits and weights_bytes(options.model) > free_memory() / 2
    if not fits:
        why = f"{odd[0]} asks for a whole load" if odd else f"{type(method).__name__} is not of a closed form"
        raise BadInput(f"--component-wise always does not go with this: {why}; leave it out")
    return True


def in_folder(entry: catalog.Method, method: Any, options: Erase) -> None:
    """Edit the folder by its files."""
    start = time.perf_counter()
    record = {
        "command": shlex.join(["sfumato", *sys.argv[1:]]),
        "method": {"name": entry.name, "verb": entry.verb, "paper": str(entry.paper)},
        "configuration": dataclasses.asdict(method),
        "parent": {"model": os.fspath(options.model)},
        "versions": versions(),
    }
    writes = [f"{options.out}/ (a diffusers folder)"]
    told = method.run_in_folder(
        options.model, options.out, options.overwrite, record, lambda plan: replace(plan, writes=writes).show()
    )
    print(f"erased {', '.join(method.concepts)} in {human_time(time.perf_counter() - start)}: {options.out}")
    done = told["component_wise"]
    print(
        f"read {human_bytes(done['read_bytes'])} of weights and wrote {human_bytes(done['written_bytes'])} "
        f"({done['tensors']} tensors); {done['linked_files']} files of weights are the original's own (hard links)"
    )


def weights_bytes(folder: str) -> int:
    """What a folder's weights take in memory, as they are loaded: in float32."""
    from sfumato.pipeline.partial import float32_bytes

    return float32_bytes(Path(folder).expanduser())


def free_memory() -> int:
    """Bytes that programs can still have on this machine."""
    import psutil

    return psutil.virtual_memory().available


def erase(method: Eraser, pipe: Model, folder: Path | None = None) -> tuple[Model, dict[str, Any]]:
    """The erased pipeline, and for its record: ``cost`` (seconds, peak memory of the process, parameters changed)
    and ``log`` (what the method says about how it went)."""
    import torch

    from sfumato.pipeline.timing import peak_memory

    start = time.perf_counter()
    erased, log = method.run(pipe, folder)
    seconds = time.perf_counter() - start
    before, after = (dict(model.network.named_parameters()) for model in (pipe, erased))
    changed = sum(p.numel() for name, p in after.items() if name in before and not torch.equal(p, before[name].to(p)))
    changed += sum(p.numel() for adapter in erased.adapters.values() for p in adapter.parameters())
    cost = {
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(pipe),
        "parameters_changed": changed,
        "parameters_total": sum(p.numel() for p in before.values()),
    }
    return erased, {"cost": cost, "log": log}


def record_of(
    entry: catalog.Method, method: Eraser, pipe: Model, model: str, told: dict[str, Any]
) -> dict[str, Any]:
    """How an erased pipeline was made; what the method was left to choose stands as it was chosen."""
    record = {**provenance(entry, method, pipe, model), **told}
    chosen = {name: told["log"][name] for name in record["configuration"].keys() & told["log"].keys()}
    return {**record, "configuration": {**record["configuration"], **chosen}}


def plan(entry: catalog.Method, method: Eraser, pipe: Any, writes: list[str]) -> Plan:
    """The method's own plan; where that cannot tell the time, with the catalogue's words."""
    made = method.costs(pipe)
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
