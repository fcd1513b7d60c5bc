"""What an audit will cost, from the pictures it will draw and one timed pass of the network."""

from __future__ import annotations

from sfumato.pipeline.timing import seconds_per_row
from sfumato.plan import Plan
from sfumato.text import counted

from .drawing import CEILING, FLOOR, Setup


def plan(setup: Setup, original: bool = True) -> Plan:
    """Pictures, memory of the weights, and time; detectors and distances are not counted.

    Args:
        original: whether the original's pictures are drawn; else they are known from another audit.
    """
    concepts, targets, kept = len(setup.cases.targets), len(setup.targets), len(setup.cases.retained)
    steps = setup.sampling["sampling_steps"]
    pictures = targets + kept
    if original:
        pictures += targets + kept + min(FLOOR, kept) + min(CEILING, kept)
    # An attack runs on the edited model, there without knowledge if there is a control, and on the original.
    words = 2 if kept else 1
    runs, each, searching = (words + original) * concepts, min(setup.n_attack, targets // concepts), 0.0
    for attack in setup.attacks.values():
        drawn = 2 if attack.looks_first else 1  # under attack, and plainly before it
        pictures += words * concepts * attack.learns_from + drawn * runs * each
        rows = attack.rows(each, steps)
        searching += runs * min(rows, attack.max_rows or rows)
    scale = setup.old.defaults["cfg_scale"] if setup.sampling["cfg_scale"] is None else setup.sampling["cfg_scale"]
    rows = pictures * steps * (1 if scale == 1 else 2) + searching
    parts = [part for pipe in (setup.old, setup.new) for part in pipe.parts().values()]
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    title = f"audit {', '.join(setup.cases.targets)}: {counted(pictures, 'picture')} with {counted(steps, 'step')}"
    if setup.attacks:
        title += f", attacks: {len(setup.attacks)}"
    seconds = rows * seconds_per_row(setup.old, min(8, setup.sampling["batch"]))
    return Plan(title, memory={"weights of both models": weights}, seconds=seconds)
