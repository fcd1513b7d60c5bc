"""What the benchmarks here time with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch

from sfumato.train.loop import Run


def timed(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each work, the fastest of ``repeats`` rounds through all of them after one that is not counted."""
    best = dict.fromkeys(works, float("inf"))
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def of_updates(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of the fastest update of every training loop that ``work`` runs, by its title or its recipe's name; what
    is prepared before and saved after does not count."""
    best: dict[str, float] = {}
    plain = Run.one_step

    def one_step(run: Run) -> Any:
        start = time.perf_counter()
        logs = plain(run)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        title = run.recipe.title or run.recipe.name
        best[title] = min(best.get(title, float("inf")), time.perf_counter() - start)
        return logs

    with patch.object(Run, "one_step", one_step):
        work()
    return best
