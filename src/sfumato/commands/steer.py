"""``sfumato steer METHOD``: pictures from prompts, drawn under one patch or several."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sfumato.commands import patches
from sfumato.commands.analysis import analyse
from sfumato.commands.options import STEPS
from sfumato.commands.sample import Sample, drawn, jobs_of, seed_alias, write
from sfumato.commands.verb import equipped, load_any, read
from sfumato.errors import BadInput
from sfumato.plan import human_time

EXAMPLE = 'sfumato steer {name} "a red star" --model sketch --seeds 0-3 --out {name}/'


@dataclass(frozen=True, kw_only=True)
class Steer(Sample):
    """Options of the verb: those of `sfumato sample`."""

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
    start = time.perf_counter()
    with patches.acting(model, steering) as logs:
        pictures, settings = drawn(model, jobs, options)
    seconds = time.perf_counter() - start
    first, *others = patches.told(steering, logs)
    log = first.pop("log")
    settings |= {"method": first, "log": log, "seconds": round(seconds, 3)}
    if others:
        settings["with"] = others
    write(options, model, jobs, pictures, settings)
    told = [f"{k}: {v}" for each in ({"log": log}, *others) for k, v in each["log"].items()]
    print(f"drawn with {names} in {human_time(seconds)}", *told, sep="; ")
