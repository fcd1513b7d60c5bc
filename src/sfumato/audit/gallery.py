"""Pictures of an audit for the report's page."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sfumato.report.images import AttackPictures, Gallery, Pair

from .drawing import Drawn, Pictures, Setup
from .measures import Attacks

SHOWN = 8
"""Pictures in a row of a page: those of the first seeds."""


def gallery(setup: Setup, drawn: Drawn, attacked: Attacks, moved: Float[Tensor, "n"]) -> Gallery:
    """Pairs of erased and of retained concepts, and a panel for each attack."""
    old, new = arrays(drawn.asked.before), arrays(drawn.asked.after)
    old_kept, new_kept = arrays(drawn.kept.before), arrays(drawn.kept.after)
    targets, retained, start = {}, {}, 0
    for concept, rows in setup.cases.targets.items():
        targets[concept] = [Pair(old[j], new[j], c.prompt, c.seed) for j, c in enumerate(rows, start)]
        start += len(rows)
    for concept in setup.cases.concepts:
        retained[concept] = [
            Pair(old_kept[j], new_kept[j], c.prompt, c.seed, float(moved[j]))
            for j, c in enumerate(setup.cases.retained)
            if concept in c.names
        ]
    panels = {}
    for name, by_concept in attacked.items():
        first = next(iter(by_concept.values()))
        control = () if first.control is None else arrays(first.control[:SHOWN])
        found = arrays(first.recovered[:SHOWN])
        panels[name] = AttackPictures(list(old[: len(found)]), list(new[: len(found)]), list(found), list(control))
    return Gallery(targets, retained, panels)


def arrays(pictures: Pictures) -> np.ndarray:
    return pictures.permute(0, 2, 3, 1).numpy()
