"""How an audit was made: enough to repeat it, and to refuse comparing it with one that was made otherwise."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.foreign import read_json, shaped
from sfumato.pipeline import Text2Image, read_record
from sfumato.pipeline.offload import stored
from sfumato.pipeline.sampling import make_scheduler
from sfumato.pipeline.saving import RECORD
from sfumato.report.schema import Cost
from sfumato.versions import versions

from .drawing import Setup
from .measures import Judged


def protocol(setup: Setup, figures: Judged, names: tuple[str, str]) -> dict[str, Any]:
    """All that has to be equal for two audits to be comparable, and what is needed to repeat one.

    Args:
        names: of the two models.
    """
    old, sampling, every = setup.old, setup.sampling, [*setup.cases.retained, *setup.targets]
    steps = {"after_sampling_steps": n} if (n := setup.new.distilled_steps) else {}
    spoken = {"languages": [c.language for c in setup.targets]} if setup.cases.languages else {}
    resized = {"detector": setup.detector.resize, "distance": setup.distance.resize}
    return {
        "before": identity(old, names[0]),
        "after": identity(setup.new, names[1]),
        "detector": setup.detector.describe(),
        "prompts": [c.prompt for c in every],
        "seeds": [c.seed for c in every],
        **spoken,
        "scheduler": _scheduler(old, sampling["scheduler"]),
        "sampling_steps": sampling["sampling_steps"],
        **steps,
        "guidance": old.defaults["cfg_scale"] if sampling["cfg_scale"] is None else sampling["cfg_scale"],
        "size": old.size,
        "resize": {"pictures": "none; rounded to 8 bits", **resized},
        "distance": {"name": setup.distance.name, "hash": setup.distance.hash},
        "batch": sampling["batch"],
        "detected_before": dict(figures.seen),
        "detected_unasked": dict(figures.unasked),
        "groups": {name: list(words) for name, words in setup.cases.groups.items()},
        "versions": versions(),
    }


def _scheduler(pipe: Text2Image, scheduler: str | None) -> dict[str, Any]:
    made = make_scheduler(pipe, scheduler)
    told = ("timestep_spacing", "steps_offset", "prediction_type")
    return {"name": type(made).__name__, **{k: made.config[k] for k in told if k in made.config}}


def identity(pipe: Text2Image, name: str) -> dict[str, Any]:
    """Name and weights' hash of a pipeline, and the adapters that are active on it."""
    about = pipe.describe()
    adapters = {"adapters": about["adapters"]} if pipe.adapters else {}
    return {"model": name, "hash": about["sha256"], **adapters}


def parameters_changed(before: Text2Image, after: Text2Image) -> tuple[int, int]:
    """(size of the tensors that differ, or that only the edited pipeline has; size of all the original's).

    Adapters that are active on the edited pipeline count as changed.
    """
    total = sum(p.numel() for part in before.parts().values() for p in part.parameters())
    return sum(p.numel() for p in changed_tensors(before, after)), total


def changed_tensors(before: Text2Image, after: Text2Image) -> Iterator[Tensor]:
    """The parameters of ``after`` that differ from ``before``'s, or that only it has, and those of its adapters."""
    old_parts = before.parts()
    for name, part in after.parts().items():
        old = dict(stored(old_parts[name])) if name in old_parts else {}
        for key, new in stored(part):
            if not (key in old and old[key].shape == new.shape and torch.equal(old[key].to(new), new)):
                yield new
    for adapter in after.adapters.values():
        yield from adapter.parameters()


def edit_record(after: str | os.PathLike | Text2Image, edit: Any) -> dict[str, Any]:
    """What is known of the edit: "method" and its configuration, "cost".

    From ``edit`` (the eraser, or a mapping) where given, otherwise from the record in the model's folder.
    """
    if dataclasses.is_dataclass(edit) and not isinstance(edit, type):
        return {"method": {"name": type(edit).__name__}, "configuration": dataclasses.asdict(edit)}
    if edit is not None:
        return dict(edit)
    if not isinstance(after, (str, os.PathLike)):
        return {}
    try:
        if Path(after).is_file():
            return shaped(read_record(os.fspath(after)), {"provenance": dict}, after)["provenance"]
        return read_json(Path(after) / RECORD, {"provenance": dict})["provenance"]
    except BadInput:
        return {}  # models of others carry no record


def method_of(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report's ``method``: name, exact configuration, and what it ``found``; None where nothing is known.

    A method that finds out something of the model which readers should know says it in its log, under "found".
    """
    method = record.get("method")
    if not method:
        return None
    name = method.get("name") if isinstance(method, Mapping) else str(method)
    configuration = record.get("configuration")
    log = record.get("log")
    found = {"found": log["found"]} if isinstance(log, Mapping) and log.get("found") else {}
    return {"name": name, **(configuration if isinstance(configuration, Mapping) else {}), **found}


def cost_of(record: Mapping[str, Any], changed: int, total: int) -> Cost:
    """Time and memory as the record tells them, parameters as counted here."""
    told = record.get("cost") or {}
    return Cost(told.get("seconds"), told.get("peak_memory_bytes"), changed, total)


def command(before: str, after: str, concepts: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The command line that repeats the audit; ``settings`` are the options that differ from the defaults."""
    words = ["sfumato", "audit", "--before", before, "--after", after, "--concepts", *concepts]
    for key, value in settings.items():
        option = "--" + key.replace("_", "-")
        if isinstance(value, (list, tuple)):
            words += [option, *map(str, value)]
        elif value is not None:
            words += [option, str(value)]
    return shlex.join([*words, "--out", "report/"])
