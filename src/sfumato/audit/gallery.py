"""Pictures of an audit for the report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sfumato.data.cases import Cases
from sfumato.report.images import AttackPictures, Gallery, Pair

from .under_attack import Outcome, Pictures

SHOWN = 8
"""Pictures in a row of a page: those of the first seeds."""


def gallery(
    cases: Cases,
    kept: Sequence[Pictures],
    asked: Sequence[Pictures],
    moved: Float[Tensor, "n"],
    n: int,
    outcomes: Mapping[str, Mapping[str, Outcome]],
) -> Gallery:
    old_kept, new_kept, old, new = (arrays(x) for x in (*kept, *asked))
    targets, retained = {}, {}
    for i, (concept, rows) in enumerate(cases.targets.items()):
        targets[concept] = [Pair(old[j], new[j], c.prompt, c.seed) for j, c in enumerate(rows, start=i * n)]
    for concept in cases.concepts:
        retained[concept] = [
            Pair(old_kept[j], new_kept[j], c.prompt, c.seed, float(moved[j]))
            for j, c in enumerate(cases.retained)
            if concept in c.names
        ]
    panels = {}
    for name, by_concept in outcomes.items():
        first = next(iter(by_concept.values()))
        control = () if first.control_pictures is None else arrays(first.control_pictures[:SHOWN])
        panels[name] = AttackPictures(
            list(old[:SHOWN]), list(new[:SHOWN]), list(arrays(first.attacked_pictures[:SHOWN])), list(control)
        )
    return Gallery(targets, retained, panels)


def arrays(pictures: Pictures) -> np.ndarray:
    return pictures.permute(0, 2, 3, 1).numpy()
