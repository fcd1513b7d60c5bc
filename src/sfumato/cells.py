"""Independent pieces of work, cell by cell: in this process, in several, or on the machines of a Ray cluster.

Whoever asks keeps each result as it comes, so that a kill loses only the cells that were at work.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, TypeVar, cast

from sfumato.errors import BadInput

Cell = TypeVar("Cell")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RETRIES = 3
"""How often a cell whose machine or process was lost is begun anew on a cluster."""


@dataclass(frozen=True)
class Failed:
    """Why a cell has no result.

    Attributes:
        reason: one sentence or line.
        refused: it was bad input, so that trying again cannot help.
        details: the traceback.
    """

    reason: str
    refused: bool = False
    details: str = ""


def finished(
    cells: Sequence[Cell],
    measure: Callable[[Cell], Any],
    *,
    jobs: int = 1,
    apart: bool = False,
    ray: str | None = None,
) -> Iterator[tuple[Cell, Any]]:
    """Every cell with what ``measure`` returns for it, or `Failed`, in the order in which they are done.

    A cell runs on one thread, so that its figures do not depend on ``jobs``.

    Args:
        cells: what to measure; picklable where they run elsewhere.
        measure: a function of a module (processes and machines import it).
        jobs: processes at a time on this machine; 1 is this process.
        apart: a process of its own for every cell also with one job, so that its peak memory is its own.
        ray: address of a Ray cluster, or "auto" for the one that this machine belongs to, or "local" for a new one
            on this machine with ``jobs`` workers; the cluster decides what runs where and begins a cell anew whose
            worker was lost.

    Raises:
        BadInput: no Ray, or no cluster at that address.
    """
    if ray is not None:
        yield from _on_a_cluster(cells, measure, ray, jobs)
    elif jobs == 1 and not apart:
        for cell in cells:
            with _one_thread():
                yield cell, measure_or_tell(measure, cell)
    else:
        yield from _in_processes(cells, measure, jobs)


def measure_or_tell(measure: Callable[[Cell], Any], cell: Cell) -> Any:
    """The result, or `Failed`; an interrupt goes on to whoever asked."""
    try:
        return measure(cell)
    except Exception as error:
        reason = str(error) if str(error) else type(error).__name__
        return Failed(reason, isinstance(error, BadInput), traceback.format_exc())


def _in_processes(
    cells: Sequence[Cell], measure: Callable[[Cell], Any], jobs: int
) -> Iterator[tuple[Cell, Any]]:
    context, waiting = multiprocessing.get_context("spawn"), list(cells)
    running: dict[Any, tuple[Any, Cell]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_beside, args=(theirs, measure, cell), daemon=True)
                with _told_one_thread():
                    process.start()
                theirs.close()
                running[ours] = process, cell
            for connection in cast(list[Any], wait(list(running))):
                process, cell = running.pop(connection)
                try:
                    result = connection.recv()
                except EOFError:  # it was killed, or ran out of memory
                    process.join()
                    result = Failed(f"its process ended with status {process.exitcode}")
                process.join()
                yield cell, result
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _beside(connection: Any, measure: Callable[[Cell], Any], cell: Cell) -> None:
    """One cell in a process of its own, which leaves it to its parent what an interrupt from the keyboard ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.send(measure_or_tell(measure, cell))


def _on_a_cluster(
    cells: Sequence[Cell], measure: Callable[[Cell], Any], address: str, jobs: int
) -> Iterator[tuple[Cell, Any]]:
    try:
        import ray
    except ImportError as error:
        raise BadInput("Ray is not installed: pip install 'sfumato[cluster]', or leave out --ray") from error
    where = {"num_cpus": jobs} if address == "local" else {"address": address}
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(**where, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except Exception as error:
            raise BadInput(f"no Ray cluster at {address!r}: start one with `ray start --head`") from error
    threads = {"env_vars": dict.fromkeys(THREADS, "1")}
    remote: Any = ray.remote(max_retries=RETRIES, num_cpus=1, runtime_env=threads)(measure_or_tell)
    try:
        running = {remote.remote(measure, cell): cell for cell in cells}
        while running:
            (done, *_), _ = ray.wait(list(running))
            cell = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayError as error:
                last = str(error).strip().splitlines()[-1]
                result = Failed(f"the cluster gave it up ({type(error).__name__}): {last}", details=str(error))
            yield cell, result
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread, in this process."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _told_one_thread() -> Iterator[None]:
    """The environment in which a process that is started uses one thread, whichever library counts them."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
