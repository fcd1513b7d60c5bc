"""Batches that are ready before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from torch import Tensor


def ahead(work: Callable[..., Any], jobs: Iterable[tuple], workers: int, start: Callable[[], None]) -> Iterator[Any]:
    """``work(*job)`` of every job, in their order, from threads that are up to ``2 * workers`` jobs ahead.

    Args:
        work: what a thread does; what it raises is raised here, in its turn.
        jobs: their arguments.
        workers: threads.
        start: called once in every thread.
    """
    pool, jobs = ThreadPoolExecutor(workers, initializer=start), iter(jobs)
    try:
        coming = deque(pool.submit(work, *job) for job in islice(jobs, 2 * workers))
        while coming:
            done = coming.popleft().result()
            coming.extend(pool.submit(work, *job) for job in islice(jobs, 1))
            yield done
    finally:
        pool.shutdown(cancel_futures=True)


class Batches:
    """The batches of a round's shares of rows, as ``(rows, batch)``; kept where more than one pass needs them."""

    def __init__(self, data: Iterator[Any], rows: Sequence[range], keep: bool):
        self.data, self.rows, self.keep = data, rows, keep
        self.kept: list[Any] = []

    def __iter__(self) -> Iterator[tuple[range, Any]]:
        if self.kept:
            yield from zip(self.rows, self.kept, strict=True)
            return
        for rows in self.rows:
            batch = next(self.data)
            if self.keep:
                self.kept.append(batch)
            yield rows, batch


def pinned(batch: Any) -> Any:
    """The tensors of a batch in memory that a GPU can read while it works."""
    if isinstance(batch, Tensor):
        return batch.pin_memory() if batch.device.type == "cpu" else batch
    if isinstance(batch, dict):
        return {k: pinned(v) for k, v in batch.items()}
    return type(batch)(map(pinned, batch)) if type(batch) in (list, tuple) else batch
