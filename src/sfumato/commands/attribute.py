"""``sfumato attribute METHOD``: which parts of a workflow have to do with a likeness, and how much."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sfumato.commands.tables import show_table
from sfumato.commands.verb import read
from sfumato.errors import BadInput
from sfumato.fields import Count
from sfumato.plan import Plan, human_time

EXAMPLE = "sfumato attribute {name} --workflow flow.toml --originals theirs/ --extractor oracle --out shares/"


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Options of the verb."""

    workflow: Path
    """TOML or JSON: model, prompt, seeds, and [[parts]] with name, kind (checkpoint, lora, control or phrase) and
    source."""
    originals: Path
    """A folder of pictures, or one, that the workflow's are held against."""
    extractor: str | None = None
    """Features for distances of sets: inception (needs --weights), oracle, pixels, random-cnn, or a vision encoder of
    transformers."""
    weights: Path | None = None
    """Weights of the FID's Inception: a safetensors file."""
    jobs: Count = 1
    """Alliances at a time, each a process."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    shown: Count = 4
    """Pictures of each alliance on the page."""
    out: Path
    """Folder for the pictures of every alliance, the shares and the page; the same command goes on with one."""


def main(args: list[str]) -> None:
    from sfumato.attribute.copyscope import plan_title
    from sfumato.attribute.parts.originals import read_originals
    from sfumato.attribute.parts.similarity import SIMILARITIES
    from sfumato.attribute.parts.workflow import read_workflow, to_levels
    from sfumato.metrics.extractors import make_extractor
    from sfumato.progress import say
    from sfumato.report.attribution import AttributionReport
    from sfumato.versions import versions

    entry, method, options = read("attribute", args, Attribute, EXAMPLE)
    workflow = read_workflow(options.workflow)
    extractor = None
    if method.distance not in SIMILARITIES:
        if options.extractor is None:
            raise BadInput(f"{method.distance} compares features: say with --extractor which, e.g. --extractor oracle")
        extractor = make_extractor(options.extractor, options.weights)
    title = plan_title(method, workflow)
    originals = read_originals(options.originals, workflow, options.device)
    Plan(title, time=entry.cost, writes=[f"{options.out}/ (alliances, shares.json, index.html)"]).show()
    began = time.perf_counter()
    found, pictures = method.attribute(
        workflow, originals, extractor=extractor, folder=options.out, jobs=options.jobs, device=options.device,
        progress=say,
    )  # fmt: skip
    report = AttributionReport(
        shares=found.to_json(),
        workflow=workflow.to_json(),
        method={"name": entry.name, "paper": str(entry.paper), **asdict(method)},
        versions=versions(),
        reproduce=shlex.join(["sfumato", *sys.argv[1:]]),
        pictures={i: list(to_levels(pictures[a][: options.shown])) for i, a in enumerate(found.worth)},
        originals=list(to_levels(originals[:8])),
    )
    report.write(options.out)
    rows = [
        (name, _told(found.shares[i]), _told(found.shapley[i]), _told(found.loo_shares[i]))
        for i, name in enumerate(found.players)
    ]
    value = "dividends" if found.about["mode"] == "dividend" else "Shapley value"
    show_table(("part", "share", value, "share by leaving it out"), rows)
    print(*report.findings(), sep="\n")
    print(f"page: {options.out / 'index.html'}, in {human_time(time.perf_counter() - began)}")


def _told(x: object) -> str:
    from sfumato.metrics.bootstrap import Estimate

    if not isinstance(x, Estimate):
        return str(x)
    return f"{x.value:.3g}" if x.low != x.low else f"{x.value:.3g} [{x.low:.3g}, {x.high:.3g}]"
