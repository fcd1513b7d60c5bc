"""One job at a time, each in a process of its own, and every one can be cancelled."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sfumato.errors import BadInput
from sfumato.text import visible

from . import child

State = Literal["waiting", "running", "done", "refused", "failed", "cancelled"]
GRACE = 10.0
"""Seconds that a cancelled process has to clear away what it was writing."""
WAITING = 8
"""Jobs that may wait."""


@dataclass(frozen=True)
class Step:
    """One command of a job: what it is called on the page, its words after ``sfumato``, and what it writes."""

    title: str
    args: tuple[str, ...]
    out: Path | None = None


@dataclass
class Job:
    """Steps that are run one after the other, and how far they are."""

    number: int
    kind: str
    steps: tuple[Step, ...]
    folder: Path
    state: State = "waiting"
    at: int = 0
    """Which step."""
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    wanted: bool = True
    """False once it has been cancelled."""

    @property
    def over(self) -> bool:
        return self.state not in ("waiting", "running")

    def notes(self, step: int | None = None) -> Path:
        """Where the process of a step leaves what it says."""
        return self.folder / f".said-{self.at if step is None else step}"

    def said(self, name: str = child.OUT, step: int | None = None) -> str:
        """What a step has printed so far."""
        try:
            return (self.notes(step) / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def moved(self) -> tuple[str, int, int] | None:
        """(what, done, of how many) of the step at work."""
        try:
            label, done, total = json.loads(self.said(child.MOVED))
        except ValueError:
            return None
        return str(label), int(done), int(total)

    def warnings(self) -> list[str]:
        """What the steps so far have warned of."""
        mark = "sfumato: warning: "
        told = [line for i in range(self.at + 1) for line in self.said(child.ERR, i).splitlines()]
        return list(dict.fromkeys(visible(line.removeprefix(mark)) for line in told if line.startswith(mark)))

    def sentence(self) -> str:
        """Why it ended as it did, where it did not end well."""
        told = [line for line in self.said(child.ERR).splitlines() if line.startswith("sfumato: ")]
        told = [line for line in told if not line.startswith("sfumato: warning: ")]
        if self.state == "cancelled":
            return "cancelled: nothing half-written was left behind"
        if not told:
            return "the process ended without a word: is the memory full?"
        return visible(told[-1].removeprefix("sfumato: "))


class Jobs:
    """The queue.

    Args:
        root: folder in which every job gets its own, ``NNN-KIND``.
        target: what a process runs, as `child.work`.
        context: of multiprocessing; by default processes are forked from one that has imported the libraries.
    """

    def __init__(self, root: Path, target: Callable[..., Any] = child.work, context: Any = None):
        self.root, self.target = root, target
        self.context = context or forking()
        self.all: list[Job] = []
        self.more = threading.Condition()
        self.process: Any = None
        self.closed = False
        self.thread = threading.Thread(target=self._work, daemon=True, name="studio-jobs")
        self.thread.start()

    def submit(self, kind: str, steps: Callable[[Path], Sequence[Step]]) -> Job:
        """Put a job at the end of the queue.

        Args:
            kind: one word, which is in its folder's name.
            steps: makes the commands, given the job's folder.

        Raises:
            BadInput: as ``steps``; too many are waiting.
        """
        with self.more:
            if sum(not job.over for job in self.all) > WAITING:
                raise BadInput(f"{WAITING} jobs are waiting already: cancel some, or wait")
            there = [_number(folder) for folder in self.root.glob("[0-9]*-*")]
            number = 1 + max([*there, *(job.number for job in self.all)], default=0)
            folder = self.root / f"{number:03d}-{kind}"
            job = Job(number, kind, tuple(steps(folder)), folder)
            folder.mkdir(parents=True)
            self.all.append(job)
            self.more.notify_all()
        return job

    def cancel(self, kind: str | None = None) -> Job | None:
        """Cancel the job at work, or the newest of a kind that is not over; None where there is none."""
        with self.more:
            open_ = [job for job in self.all if not job.over and kind in (None, job.kind)]
            job = open_[-1 if kind else 0] if open_ else None
            if job is not None:
                job.wanted = False
                if job.state == "waiting":
                    job.state = "cancelled"
            self.more.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """How many are to be over before this one begins."""
        return sum(not other.over and other.number < job.number for other in self.all)

    def close(self) -> None:
        """Cancel everything, and wait for the process at work to end."""
        with self.more:
            self.closed = True
            for job in self.all:
                job.wanted = False
            self.more.notify_all()
        self.thread.join(GRACE + 5)

    def _work(self) -> None:
        while True:
            with self.more:
                while not self.closed and not any(job.state == "waiting" and job.wanted for job in self.all):
                    self.more.wait()
                if self.closed:
                    return
                job = next(job for job in self.all if job.state == "waiting" and job.wanted)
                job.state, job.began = "running", time.monotonic()
            state: State = "failed"
            try:
                state = self._run(job)
            finally:
                job.seconds = time.monotonic() - job.began
                job.state = state

    def _run(self, job: Job) -> State:
        for i, step in enumerate(job.steps):
            job.at = i
            job.notes().mkdir(parents=True, exist_ok=True)
            process = self.context.Process(target=self.target, args=(list(step.args), job.notes()))
            process.start()
            while process.is_alive() and job.wanted:
                process.join(0.1)
            if not job.wanted:
                _end(process)
                return "cancelled"
            process.join()
            if process.exitcode:
                return "refused" if process.exitcode == 2 else "failed"
        return "done"


def forking() -> Any:
    """Processes forked from one that has imported what jobs need; where that cannot be, fresh ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(child.WARM))
    forkserver.ensure_running()
    return context


def _end(process: Any) -> None:
    """Politely, so that what it was writing is cleared away; then not."""
    process.terminate()
    process.join(GRACE)
    if process.is_alive():
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _number(folder: Path) -> int:
    head = folder.name.partition("-")[0]
    return int(head) if head.isdecimal() else 0
