"""``sfumato steer METHOD``: pictures from prompts, drawn under one patch or several."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sfumato.commands import patches
from sfumato.commands.analysis import analyse
from sfumato.commands.options import STEPS
from sfumato.commands.sample import Sample, as_levels, draw, drawn, jobs_of, seed_alias, write
from sfumato.commands.verb import equipped, load_any, read
from sfumato.errors import BadInput
from sfumato.files import save_png
from sfumato.plan import human_time

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = 'sfumato steer {name} "a red star" --model sketch --seeds 0-3 --out {name}/'


@dataclass(frozen=True, kw_only=True)
class Steer(Sample):
    """Options of the verb: those of `sfumato sample`."""

    writes: ClassVar[str] = "PNG, sheet.png, sample.json, index.html"

    plain: bool = True
    """Draw the pictures without the method too, on the same seeds, to show both on the page (index.html), which takes
    as long again; --no-plain leaves them out."""
    analyse: bool = False
    """Write what the method says of the model (tables and a figure) and draw nothing; with prompts it looks at a run of
    them too."""


def main(args: list[str]) -> None:
    entry, patch, options = read("steer", seed_alias(args), Steer, EXAMPLE, STEPS)
    if options.analyse:
        if options.with_:
            raise BadInput("--analyse looks at one method: leave --with out")
        analyse(entry, patch, options)
        return
    jobs = jobs_of(options, EXAMPLE.format(name=entry.name))
    steering = [(entry, patch), *patches.named(options.with_, options.model)]
    patches.refuse_twice(steering)
    model = equipped(load_any(options.model, options), options.model, options)
    names = " and ".join(method.name for method, _ in steering)
    also = f", and as many without {names}, which takes as long again" if options.plain else ""
    start = time.perf_counter()
    with patches.acting(model, steering) as logs:
        pictures, settings = drawn(model, jobs, options, also=also)
    seconds = {"steered": time.perf_counter() - start}
    first, *others = patches.told(steering, logs)
    log = first.pop("log")
    settings |= {"method": first, "log": log, "seconds": round(seconds["steered"], 3)}
    if others:
        settings["with"] = others
    plain = None
    if options.plain:
        start = time.perf_counter()
        plain = draw(model, jobs, options)
        seconds["plain"] = time.perf_counter() - start

    def page(folder: Path, files: Sequence[str], about: Mapping[str, Any]) -> None:
        before = None if plain is None else as_levels(plain)
        if before is not None:
            (folder / "plain").mkdir()
            unsteered = {key: x for key, x in about.items() if key not in ("method", "log", "with", "seconds")}
            for name, array, (prompt, seed) in zip(files, before, jobs, strict=True):
                save_png(folder / "plain" / name, array, {**unsteered, "prompt": str(prompt or ""), "seed": seed})
        text = _page([method.name for method, _ in steering], jobs, pictures, before, about, seconds)
        (folder / "index.html").write_text(text, encoding="utf-8")

    write(options, model, jobs, pictures, settings, page)
    told = [f"{k}: {v}" for each in ({"log": log}, *others) for k, v in each["log"].items()]
    print(f"drawn with {names} in {human_time(seconds['steered'])}", *told, sep="; ")
    print(f"look at them in {options.out / 'index.html'}")


def _page(
    methods: Sequence[str], jobs: list, pictures: Tensor, before: Any, about: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> str:  # fmt: skip
    """The page, with the command that makes it again."""
    from sfumato.report.steer import SteerReport, render

    labels = [f"{prompt or 'without words'}, seed {seed}" for prompt, seed in jobs]
    command = shlex.join(["sfumato", *sys.argv[1:]])
    return render(SteerReport(methods, as_levels(pictures), before, labels, about, seconds, command))
