"""What an audit will cost, from the pictures it will draw and one timed pass of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.attack.base import Attack
from sfumato.data.cases import Cases
from sfumato.pipeline import Text2Image
from sfumato.pipeline.timing import seconds_per_row
from sfumato.plan import Plan

from .measures import CEILING, FLOOR


def plan(
    old: Text2Image,
    new: Text2Image,
    cases: Cases,
    attacks: Sequence[Attack],
    n_attack: int,
    sampling: Mapping[str, Any],
) -> Plan:
    """Pictures, memory of the weights, and time; detectors and distances are not counted."""
    targets, kept = sum(map(len, cases.targets.values())), len(cases.retained)
    pictures = 2 * (targets + kept) + min(FLOOR, kept) + min(CEILING, kept)
    # An attack runs on the edited model, there without knowledge if there is a control, and on the original.
    words = 2 if kept else 1
    runs, training = (words + 1) * len(cases.targets), 0.0
    for attack in attacks:
        learned_from = words * len(cases.targets) * getattr(attack, "n_images", 0)
        pictures += learned_from + runs * min(n_attack, targets // len(cases.targets))
        training += runs * attack.passes(sampling["sampling_steps"])
    scale = old.defaults["cfg_scale"] if sampling["cfg_scale"] is None else sampling["cfg_scale"]
    rows = pictures * sampling["sampling_steps"] * (1 if scale == 1 else 2) + training
    parts = [part for pipe in (old, new) for part in pipe.parts().values()]
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    title = f"audit {', '.join(cases.targets)}: {pictures} pictures with {sampling['sampling_steps']} steps"
    if attacks:
        title += f", attacks: {len(attacks)}"
    seconds = rows * seconds_per_row(old, min(8, sampling["batch"]))
    return Plan(title, memory={"weights of both models": weights}, seconds=seconds)
