"""``sfumato steer METHOD``: pictures from prompts, drawn under a patch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from sfumato.commands.analysis import analyse
from sfumato.commands.options import STEPS
from sfumato.commands.sample import Sample, drawn, jobs_of, seed_alias, write
from sfumato.commands.verb import equipped, load_any, read
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
        analyse(entry, patch, options)
        return
    jobs = jobs_of(options, EXAMPLE.format(name=entry.name))
    pipe = equipped(load_any(options.model, options), options.model, options)
    start = time.perf_counter()
    with patch.patch(pipe) as told:
        pictures, settings = drawn(pipe, jobs, options)
    seconds = time.perf_counter() - start
    method = {"name": entry.name, "verb": entry.verb, "paper": str(entry.paper), "configuration": asdict(patch)}
    settings |= {"method": method, "log": dict(told), "seconds": round(seconds, 3)}
    write(options, pipe, jobs, pictures, settings)
    print(f"drawn with {entry.name} in {human_time(seconds)}", *(f"{k}: {v}" for k, v in told.items()), sep="; ")
