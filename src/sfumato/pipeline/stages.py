"""Stages of time: words that stand for another word in each part of the way from noise to picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def stage_of(t: float, stages: int, timesteps: int = 1000) -> int:
    """s = floor(i S / T) at the timestep i = t T - 1: stage 0 ends a draw, stage S - 1 begins it.

    Args:
        t: time in [0, 1], 1 = noise.
        stages: S, how many.
        timesteps: T of the model. Between timesteps, and beyond the first and the last, the nearest stage counts.
    """
    at = t * timesteps - 1
    step = round(at)
    # As `TableClock.number` does: a time in float32 is a timestep only nearly.
    stage = step * stages // timesteps if abs(at - step) <= 1e-3 else int(at * stages / timesteps)
    return min(max(stage, 0), stages - 1)


def in_stage(prompt: str, stages: Mapping[str, Sequence[str]], t: float, timesteps: int = 1000) -> str:
    """A prompt as it is said at time ``t``: each word of ``stages`` replaced by that of its stage, which may be empty.

    Args:
        stages: for each word what it stands for, one text a stage, stage 0 (which comes last) first.
    """
    if not any(word in prompt for word in stages):
        return prompt
    said = lambda match: stages[match[0]][stage_of(t, len(stages[match[0]]), timesteps)]
    words = "|".join(map(re.escape, sorted(stages, key=len, reverse=True)))
    return " ".join(re.sub(words, said, prompt).split())
