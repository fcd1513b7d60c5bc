"""Quality against cost: the same pictures drawn in several ways, each with what it cost and how good they are."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato import __version__, catalog
from sfumato.data import oracle as oracles
from sfumato.data import sketch
from sfumato.data.base import Rows
from sfumato.data.pictures import open_pictures, source_for
from sfumato.errors import BadInput, unknown
from sfumato.metrics.alignment import oracle_alignment
from sfumato.metrics.bootstrap import share_interval
from sfumato.metrics.extractors import Extractor, make_extractor
from sfumato.metrics.features import Features, extract
from sfumato.metrics.resize import to_bytes
from sfumato.metrics.sets import FID
from sfumato.pipeline import Model
from sfumato.progress import track
from sfumato.report.cost import CostReport, Point
from sfumato.report.schema import Interval
from sfumato.settings import settings_for
from sfumato.versions import versions

from .gallery import SHOWN, arrays
from .measures import interval

SAMPLERS = ("ddim", "addim", "dpm++")
STEPS = (2, 4, 8, 16, 25, 50)
STUDENTS = "students"
"""Their group, with the method where that is known."""


@dataclass(frozen=True)
class Way:
    """One way to draw: a point of the curve ``group``.

    Attributes:
        group: what it belongs to, e.g. "teacher, ddim": one line of the plot.
        label: which of the group it is, e.g. "8 steps".
        model: what draws.
        options: of the model's ``draw``.
        around: a context manager made anew around all drawing, e.g. ``lambda: patch.patch(model)``.
    """

    group: str
    label: str
    model: Model
    options: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager] = nullcontext


def ways(
    teacher: Model,
    students: Mapping[str, Model],
    sampling_steps: Sequence[int] = STEPS,
    samplers: Sequence[str] = SAMPLERS,
    patches: Sequence[str] = (),
    methods: Mapping[str, str] | None = None,
) -> list[Way]:
    """The teacher with several samplers at several numbers of steps, students at their own, and patches.

    Args:
        students: name -> model.
        patches: of the catalogue, each as "name" or "name:preset", on the teacher with DDIM at the largest of
            ``sampling_steps``.
        methods: student's name -> what distilled it, where that is known: its students have a colour of their own.

    Raises:
        BadInput: an unknown patch or preset.
    """
    if patches and not sampling_steps:
        raise BadInput("patches are drawn with the largest number of steps: give some with --sampling-steps")
    found = [
        Way(f"teacher, {sampler}", _steps(n), teacher, {"sampling_steps": n, "scheduler": sampler})
        for sampler in samplers
        for n in sampling_steps
    ]
    for name, student in students.items():
        group = f"{STUDENTS}, {by}" if (by := (methods or {}).get(name)) else STUDENTS
        found.append(Way(group, f"{name}, {_steps(student.sampling_steps)}", student))
    for name in patches:
        method, _, preset = name.partition(":")
        entry, n = catalog.get(method, "steer"), max(sampling_steps)
        if preset and preset not in entry.presets:
            raise unknown(f"preset of {method}", preset, entry.presets)
        patch = entry.load()(**(entry.presets[preset] if preset else settings_for(entry.load(), teacher)))
        label = f"{preset or 'its defaults'}, {_steps(n)}"
        around = lambda patch=patch: patch.patch(teacher)
        found.append(Way(f"teacher, {method}", label, teacher, {"sampling_steps": n, "scheduler": "ddim"}, around))
    return found


def measure(
    ways: Sequence[Way],
    *,
    data: str = "",
    n: int = 256,
    n_real: int = 2048,
    seed: int = 0,
    batch: int = 64,
    extractor: str = "oracle",
    weights: str | None = None,
    progress: bool = False,
    announce: Callable[[float], None] | None = None,
) -> CostReport:
    """Draw ``n`` pictures in every way, with the same prompts (or classes) and seeds, and measure them.

    For each: network evaluations and seconds a picture (the median over batches, autoencoder included), the Fréchet
    distance of ``extractor``'s features to ``n_real`` other pictures of ``data``, and for the sketch world how much of
    what was asked for the oracle reads off a picture. Both with 95 % intervals.

    ``announce`` is called with the seconds that drawing will take, before it begins.

    ``data`` are by default the sketch world's, for models of it.

    Raises:
        BadInput: no data named for models of another world; too little data; classes that are not the models'; models
            with and without text together.
    """
    data, size = source_for(data, ways[0].model), ways[0].model.size
    pictures = open_pictures(data, size, seed=50_000 + seed, count=4 * (n + n_real))
    rows = [i for i in range(len(pictures)) if data != "sketch" or _one_object(pictures.caption(i))][: n + n_real]
    if len(rows) < n + 2:
        raise BadInput(f"{data} has {len(rows)} pictures, too few to draw {n} and to compare with others")
    asked, others = rows[:n], rows[n:]
    words = ways[0].model.asked_for(pictures, asked)
    if any(way.model.asked_for(pictures, asked) != words for way in ways[1:]):
        raise BadInput("models that draw from text and models that do not cannot be compared: they get other prompts")
    if announce:
        announce(_seconds(ways, words, n, batch))
    made = make_extractor(extractor, weights)
    real = Features(extract(Rows(pictures, others), made, progress=progress), **_about(made))
    points = []
    for way in track(ways, "drawing", progress):
        images, nfe, seconds = draw(way, words, [seed * n + i for i in range(n)], batch)
        quality = _quality(images, words, real, made, data, seed)
        first = list(arrays(to_bytes(images[:SHOWN]).cpu()))
        points.append(Point(way.group, way.label, nfe, seconds, *quality, first))
    models = {id(w.model): (w.label if w.group.startswith(STUDENTS) else "teacher", w.model) for w in ways}
    protocol = {
        "data": data, "pictures": n, "real pictures": len(others), "seed": seed, "batch": batch, "size": size,
        "shown": list(words[:SHOWN]) if words else [""] * min(n, SHOWN),
        "extractor": made.name, "weights": made.hash, "device": str(ways[0].model.device),
        "threads": torch.get_num_threads(), "versions": versions(),
        "models": {name: model.describe()["sha256"] for name, model in models.values()},
    }  # fmt: skip
    return CostReport(points, protocol, datetime.now(UTC).isoformat(timespec="seconds"), __version__)


def draw(
    way: Way, asked: Sequence[Any] | None, seeds: Sequence[int], batch: int
) -> tuple[Float[Tensor, "n 3 height width"], float, float]:
    """Pictures in [0, 1], and for each of them the network evaluations and the seconds that it took."""
    parts, times, model = [], [], way.model
    options = {"batch": batch, **way.options}
    with way.around():
        model.draw(asked and asked[:1], seeds[:1], **options)  # what only the first call pays for
        with counted(model) as count:
            for start in range(0, len(seeds), batch):
                chunk = slice(start, start + batch)
                began = time.perf_counter()
                parts.append(model.draw(asked and asked[chunk], seeds[chunk], **options))
                times.append((time.perf_counter() - began) / len(parts[-1]))
    return torch.cat(parts), count["rows"] / len(seeds), median(times)


def _seconds(ways: Sequence[Way], asked: Sequence[Any] | None, n: int, batch: int) -> float:
    """How long ``n`` pictures in every way will take, from one batch in the first."""
    some = min(n, batch)
    _, _, seconds = draw(ways[0], asked and asked[:some], range(some), batch)
    steps = [way.options.get("sampling_steps", way.model.sampling_steps) for way in ways]
    return seconds / steps[0] * sum(steps) * n


@contextmanager
def counted(model: Model) -> Iterator[dict[str, int]]:
    """Counts the pictures that leave the network in the block, the two halves of guidance as two."""
    count = {"rows": 0}

    def hook(module: Any, args: tuple, output: Any) -> None:
        count["rows"] += len(output)

    handle = model.last.register_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def _quality(
    images: Tensor, words: Sequence[Any] | None, real: Features, extractor: Extractor, data: str, seed: int
) -> tuple[Interval | None, Interval]:
    """(accuracy, Fréchet distance)."""
    made = Features(torch.cat([extractor(to_bytes(part)) for part in images.split(64)]), **_about(extractor))
    score = FID(seed=seed).measure(real, made)
    distance = Interval(score.value, score.low, score.high, score.n_gen)
    if data != "sketch" or words is None:
        return None, distance
    with torch.no_grad():
        logits = [oracles.load()(part) for part in images.split(64)]
    read = {a: torch.cat([x[a] for x in logits]) for a in oracles.WORDS}
    shares = oracle_alignment(read, oracles.WORDS, words)
    rng = torch.Generator().manual_seed(seed)
    return interval(share_interval(shares[shares.isfinite()], rng)), distance


def _about(extractor: Extractor) -> dict[str, Any]:
    return {"extractor": extractor.name, "weights": extractor.hash, "resize": extractor.resize}


def _one_object(caption: str) -> bool:
    """Whether a caption of the sketch world asks for one object, which is what the oracle can read."""
    return sum(word in sketch.OBJECTS for word in re.findall(r"[\w-]+", caption)) == 1


def _steps(n: int) -> str:
    return f"{n} step" + "s" * (n > 1)


