"""What the benchmarks here time with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


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
