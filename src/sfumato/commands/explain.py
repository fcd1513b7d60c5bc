"""``sfumato explain METHOD``: judge explanations of a trained classifier. Killed? The same command goes on."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.commands.tables import show_table
from sfumato.commands.verb import Where, load_any, read
from sfumato.errors import BadInput
from sfumato.fields import Count
from sfumato.plan import Plan, human_time
from sfumato.text import counted

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = "sfumato explain {name} --classifier run/model --projector diffusion/model --out judged/"


@dataclass(frozen=True, kw_only=True)
class Explain(Where):
    """Options of the verb."""

    classifier: Path
    """Folder that `classify` wrote: its network is explained, its recipe trains again."""
    data: str | None = None
    """Pictures of its classes, as for `classify`; by default those that it was trained on, split as they were then."""
    count: Count | None = None
    """At most so many of the pictures to train on, and a quarter as many to measure on; by default all."""
    projector: str | None = None
    """A model of such pictures (`train` makes one), which brings moved pictures back to the manifold."""
    out: Path
    """Folder for the figures and the page; the same command goes on with one."""


def main(args: list[str]) -> None:
    from sfumato import catalog
    from sfumato.classify.base import Classifier
    from sfumato.files import held, write_json
    from sfumato.metrics.trained import described, load_trained
    from sfumato.progress import bar
    from sfumato.report.explanation import ExplanationReport
    from sfumato.versions import versions

    entry, method, options = read("explain", args, Explain, EXAMPLE)
    about, _ = described(options.classifier)
    kind: type[Classifier] = catalog.get(str(about["classifier"]), "classify").load()
    recipe = kind.of(options.classifier)
    recipe = replace(recipe, updates=method.updates) if method.updates else recipe
    seen, unseen, told = _pictures(recipe, options)
    trained = load_trained(options.classifier)
    device = options.device or trained.device
    projector = None if options.projector is None else load_any(options.projector, options)
    trainings, labels = method.trainings(), tuple(about["labels"])
    title = f"{counted(len(method.attributions), 'attribution')}, {counted(trainings, 'training')} of "
    title += f"{counted(recipe.updates, 'update')} on {counted(len(seen[0]), 'picture')}"
    Plan(title, time=entry.cost, writes=[f"{options.out}/ (points.json, figures.json, index.html)"]).show()
    began = time.perf_counter()
    with held(options.out) as folder, bar("judging", trainings, True) as advance:
        found = method.judge(
            trained.network.to(device), *(x.to(device) for x in seen), test=tuple(x.to(device) for x in unseen),
            retrain=lambda x, y, seed: recipe.trained_on(x, y, labels, seed).to(device),
            projector=projector, folder=folder, advance=advance,
        )  # fmt: skip
        report = ExplanationReport(
            figures=found.figures,
            labels=labels,
            measured_on=told,
            method={"name": entry.name, "paper": str(entry.paper), **asdict(method)},
            classifier=str(options.classifier),
            projector=options.projector,
            versions=versions(),
            reproduce=shlex.join(["sfumato", *sys.argv[1:]]),
            strips=found.strips,
        )
        write_json(folder / "figures.json", report.to_json(), overwrite=True)
        report.write(folder)
    show_table(("attribution", "score", "leakage probe"), report.rows())
    print(*report.findings(), sep="\n")
    print(f"page: {options.out / 'index.html'}, in {human_time(time.perf_counter() - began)}")


def _pictures(recipe: Any, options: Explain) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    """Pictures and labels to train on and to measure on, and which these are."""
    import torch

    from sfumato.data.pictures import to_tensor

    recipe = recipe if options.data is None else replace(recipe, data=options.data, test=None)
    seen, unseen, told = recipe.parts()
    if not (recipe.held_out or recipe.test):
        raise BadInput(f"{options.classifier} was trained on all its pictures: name others with --data")
    rng = torch.Generator().manual_seed(recipe.seed)

    def taken(pictures: Any, most: int) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(pictures), generator=rng)[:most].tolist()
        x = to_tensor([pictures.picture(row) for row in rows])
        return x, torch.tensor([pictures.label(row) for row in rows])

    if options.count is None:
        return taken(seen, len(seen)), taken(unseen, len(unseen)), told
    return taken(seen, options.count), taken(unseen, max(2, options.count // 4)), told
