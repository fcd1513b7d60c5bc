"""Cells end with the same results wherever they run, and one that is lost takes none with it."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from sfumato.cells import Failed, finished
from sfumato.errors import BadInput


def draw(cell: int) -> list[float]:
    if cell == 13:
        raise BadInput("thirteen will not do")
    if cell == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw_alone(cell)


def loses_its_first_worker(marker: Path, cell: int) -> list[float]:
    """The first time that cell 2 is begun, its worker is killed in the middle."""
    if cell == 2 and not marker.exists():
        marker.write_text("")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(cell)


def threads(cell: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def test_a_cell_elsewhere_is_told_to_use_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert dict(finished([1, 2], threads, jobs=2)) == {1: "1", 2: "1"} and os.environ["OMP_NUM_THREADS"] == "5"


def test_one_process_or_several_find_the_same():
    here, there = (dict(finished(range(3), draw, jobs=jobs)) for jobs in (1, 2))
    assert here == there and here[1] == draw_alone(1)


def draw_alone(cell: int) -> list[float]:
    return [random.Random(cell).random() for _ in range(3)]


def test_what_fails_says_why_and_the_rest_goes_on():
    found = dict(finished([1, 13, 99, 2], draw, jobs=2))
    assert found[13].refused and found[13].reason == "thirteen will not do" and "Traceback" in found[13].details
    assert isinstance(found[99], Failed) and not found[99].refused and "-9" in found[99].reason
    assert found[1] == draw_alone(1) and found[2] == draw_alone(2)


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_loses_no_cell(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra 'cluster'")
    roots = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(roots))  # where the workers find this file
    measure = partial(loses_its_first_worker, tmp_path / "killed")
    found = dict(finished(range(4), measure, ray="local", jobs=2))
    assert (tmp_path / "killed").exists()
    assert found == {i: draw_alone(i) for i in range(4)}


def test_a_cluster_without_ray_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(BadInput, match="sfumato\\[cluster\\]"):
        next(finished([1], draw, ray="auto"))
