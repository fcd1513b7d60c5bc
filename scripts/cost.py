"""Quality against cost of a model and its students by every distillation: docs/results/sketch-cost.md, cifar10-cost.md.

    python scripts/cost.py --work cost                   # hours; killed? the same command goes on where it stopped
    python scripts/cost.py --work cost --world cifar10 --data cifar10     # a folder with train.parquet and test.parquet
    python scripts/cost.py --work cost --only page

The page shows the very commands that are run, in one folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import output, run
from sfumato.audit.cost import SAMPLERS
from sfumato.report.schema import Interval
from sfumato.report.words import bounds, number, value

ROOT = Path(__file__).resolve().parents[1]
JOINED = {f"teacher, {sampler}" for sampler in SAMPLERS}
FIGURES = {"accuracy": "what was asked for and is there", "distance": "Fréchet distance"}


@dataclass(frozen=True)
class World:
    """What is compared.

    Attributes:
        title: what the page calls it.
        about: what the page says of the teacher and its students.
        students: the commands that make them, and what comes before.
        compare: the command that draws and measures.
    """

    title: str
    about: str
    students: Sequence[str]
    compare: str


def of_sketch(name: str, settings: str) -> str:
    """A distillation of the embedded pipeline."""
    return f"sfumato distill {name.rpartition('-')[0]} --teacher sketch {settings} --out students/{name}"


SKETCH = {
    "multistep-cm-1": "--steps 1 --eta 0 --updates 500 --anneal 250",
    "multistep-cm-4": "--steps 4 --updates 500 --anneal 250",
    "moment-matching-8": "--steps 8 --updates 500",
    "instaflow-1": "--pairs 2000 --reflow-updates 500 --updates 500 --perceptual-updates 150",
}
TEACHER = (
    "--teacher cifar10-model --data cifar10/train.parquet --preset sketch --updates 400 --batch 64 --warmup 40"
)
WORLDS = {
    "sketch": World(
        "the embedded pipeline",
        "The students are trained for 500 updates of 32 from the teacher's weights, InstaFlow's twice for so many on "
        "2,000 pairs: from a quarter to a half of what the presets say. What was asked for and is there: the share of "
        "the named attributes that the [oracle](../oracle.md) reads off the pictures; distances are in its features.",
        [of_sketch(name, settings) for name, settings in SKETCH.items()],
        f"sfumato compare --teacher sketch --students {' '.join(f'students/{name}' for name in SKETCH)} --patches "
        "faster-diffusion faster-diffusion:uniform --sampling-steps 2 4 8 16 25 --out sketch-cost",
    ),
    "cifar10": World(
        "CIFAR-10",
        "A small class-conditional model as that of [cifar10.md](cifar10.md), and its students; distances are to the "
        "test split, in the features of a small classifier.",
        [
            "sfumato train sid2 --preset small-cifar10 --data cifar10/train.parquet --updates 3000 --out cifar10-model",
            "sfumato classify plain --data cifar10/train.parquet --test cifar10/test.parquet --held-out 0.2 --flip "
            "--label-smoothing 0.05 --updates 1000 --warmup 200 --out cifar10-judge",
            f"sfumato distill multistep-cm {TEACHER} --anneal 200 --steps 8 --out cifar10-students/multistep-cm-8",
            f"sfumato distill moment-matching {TEACHER} --steps 8 --out cifar10-students/moment-matching-8",
            f"sfumato distill instaflow {TEACHER} --reflow-updates 400 --perceptual-updates 0 --pairs 2000 "
            "--out cifar10-students/instaflow-1",
        ],
        "sfumato compare --teacher cifar10-model --students cifar10-students/multistep-cm-8 "
        "cifar10-students/moment-matching-8 cifar10-students/instaflow-1 --data cifar10/test.parquet --extractor "
        "cifar10-judge/model --steps 4 8 16 32 --samplers ddim addim --out cifar10-cost",
    ),
}  # fmt: skip


def read(point: Mapping[str, Any], key: str) -> Interval | None:
    """A figure of a point of ``cost.json``."""
    return Interval.from_json(point[key], "mean" if key == "accuracy" else "value")


def measured(points: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Those of `FIGURES` that all points have."""
    return {key: label for key, label in FIGURES.items() if all(p[key] for p in points)}


def said(figure: Interval | None, rate: bool = True) -> str:
    """A figure with its interval."""
    return f"{value(figure, rate)} {bounds(figure, rate)}".strip()


def curves(points: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Both figures against the network's evaluations, a colour a group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    told = measured(points)
    figure, axes = pyplot.subplots(1, len(told), figsize=(5 * len(told) + 2, 4), layout="constrained", squeeze=False)
    for axis, (key, label) in zip(axes[0], told.items(), strict=True):
        for group in dict.fromkeys(p["group"] for p in points):
            of = sorted((p for p in points if p["group"] == group), key=lambda p: p["nfe"])
            found = [read(p, key) for p in of]
            ends = [[i.value - i.low for i in found], [i.high - i.value for i in found]]
            style = "o-" if group in JOINED else "o"
            axis.errorbar([p["nfe"] for p in of], [i.value for i in found], ends, fmt=style, label=group)
        axis.set(xlabel="network evaluations for a picture", ylabel=label, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0, -1].set_yscale("log")
    axes[0, -1].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axes[0, -1].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes[0, -1].yaxis.set_minor_locator(NullLocator())
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def page(world: World, name: str, points: Sequence[Mapping[str, Any]]) -> str:
    """What is said of a comparison, with all figures."""
    told = measured(points)
    rows = []
    for p in points:
        cost = f"{number(p['nfe'])} | {number(p['seconds'])}"
        figures = " | ".join(said(read(p, key), rate=key == "accuracy") for key in told)
        rows.append(f"| {p['group']} | {p['label']} | {cost} | {figures} |")
    return "\n".join([
        f"# Quality against cost, on {world.title}",
        "",
        world.about,
        "",
        f"![Curves]({name}/curves.png)",
        "",
        f"The whole page, with pictures of every way to draw: [{name}/index.html]({name}/index.html) (opens from "
        f"disk); all figures: [cost.json]({name}/cost.json). {points[0]['distance']['n']} pictures in each way, with "
        "95 % intervals; guidance counts as two evaluations. Seconds are of one thread of a machine that may have had "
        "other work: evaluations tell more.",
        "",
        f"| way | | evaluations | seconds | {' | '.join(told.values())} |",
        f"| --- | --- | ---: | ---: |{' --- |' * len(told)}",
        *rows,
        "",
        "```",
        *world.students,
        world.compare,
        "```",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, kept")
    parser.add_argument("--world", choices=sorted(WORLDS), default="sketch")
    parser.add_argument("--data", type=Path, help="of cifar10: a folder with train.parquet and test.parquet")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--only", choices=("students", "compare", "page"), help="by default all")
    parser.add_argument("--student", help="with --only students: that one alone, to run several side by side")
    args = parser.parse_args()
    world, name, only = WORLDS[args.world], f"{args.world}-cost", lambda stage: args.only in (None, stage)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.data and not (args.work / "cifar10").exists():
        (args.work / "cifar10").symlink_to(args.data.resolve())
    if only("students"):
        for command in world.students:
            if args.student in (None, Path(output(command)).name):
                run(command, args.work)
    if only("compare"):
        run(f"{world.compare} --overwrite", args.work)
    if only("page"):
        target = args.docs / "results" / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("index.html", "cost.json"):
            shutil.copy(args.work / name / file, target / file)
        points = json.loads((target / "cost.json").read_text())["points"]
        curves(points, target / "curves.png")
        (args.docs / "results" / f"{name}.md").write_text(page(world, name, points), encoding="utf-8")


if __name__ == "__main__":
    main()
