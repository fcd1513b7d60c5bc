"""The training loop: same bits after a kill, refusals, finite losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.errors import BadInput, SfumatoError
from sfumato.train.loop import Run, Schedule, learning_rate, resolved_precision, step_seed


class Line:
    """Fit a line, with dropout so that hidden randomness would show."""

    name = "line"

    def __init__(self, blow_up_at: int = -1):
        torch.manual_seed(0)
        self.net, self.blow_up_at = (
            nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 1)),
            blow_up_at,
        )

    def modules(self):
        return {"net": self.net}

    def batch(self, step, rng, size):
        x = torch.randn(size, 2, generator=rng)
        return x, x.sum(1, keepdim=True) * (float("nan") if step == self.blow_up_at else 1)

    def loss(self, batch, rng):
        x, y = batch
        loss = (self.net(x + 0.1 * torch.randn(x.shape, generator=rng)) - y).square().mean()
        return loss, {}


def line_run(folder, steps=40, recipe=None, **changes) -> Run:
    settings = {"batch": 4, "lr": 0.01, "warmup": 5, "precision": "no", "checkpoint_every": 10, **changes}
    return Run(recipe or Line(), Schedule(steps, **settings), Path(folder))


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.params.values()])


def test_resumed_run_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = line_run(tmp_path / "a")
    whole.fit(progress=False)
    half = line_run(tmp_path / "b")
    for _ in range(17):
        half.one_step()
    half.save()
    again = line_run(tmp_path / "b")
    again.fit(progress=False)
    assert again.step == 40
    assert torch.equal(weights(whole), weights(again))


def test_killed_run_goes_on_to_the_same_bits(tmp_path):
    """kill -9 at an arbitrary moment, then the same command."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from test_loop import line_run\n"
        "run = line_run(sys.argv[1], steps=400)\n"
        "step = run.one_step\n"
        "run.one_step = lambda: (time.sleep(0.005), step())[1]\n"
        "run.fit(progress=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "killed"), str(Path(__file__).parent)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 60
    while not (tmp_path / "killed/checkpoint/run.json").exists() and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = json.loads((tmp_path / "killed/checkpoint/run.json").read_text())["step"]
    assert 0 < stopped < 400
    resumed, whole = line_run(tmp_path / "killed", steps=400), line_run(tmp_path / "whole", steps=400)
    resumed.fit(progress=False)
    whole.fit(progress=False)
    assert torch.equal(weights(resumed), weights(whole))


def test_changed_setting_is_named_and_refused(tmp_path):
    line_run(tmp_path).fit(progress=False)
    with pytest.raises(BadInput, match=r"lr=0\.01"):
        line_run(tmp_path, lr=0.02).fit(progress=False)


def test_not_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(SfumatoError, match="not finite"):
        line_run(tmp_path, recipe=Line(blow_up_at=19)).fit(progress=False)
    assert json.loads((tmp_path / "checkpoint/run.json").read_text())["step"] == 10


def test_interrupted_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    run = line_run(tmp_path)
    for _ in range(3):
        run.one_step()
    run.save()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    run.one_step()
    with monkeypatch.context() as patched, pytest.raises(BadInput, match="disk is full"):
        patched.setattr("sfumato.train.loop.save_file", full_disk)
        run.save()
    again = line_run(tmp_path)
    again.resume()
    assert again.step == 3


def test_learning_rate_and_seeds():
    s = Schedule(100, 1, 2.0, warmup=10, final_lr=0.1)
    assert learning_rate(s, 0) == pytest.approx(0.2) and learning_rate(s, 10) == pytest.approx(2.0)
    assert learning_rate(s, 100) == pytest.approx(0.2)
    seeds = {step_seed(a, b, c) for a in range(3) for b in range(50) for c in range(3)}
    assert len(seeds) == 450


@pytest.mark.parametrize(("decay", "half", "end"), [("cosine", 1.0, 0.0), ("linear", 1.0, 0.0), ("constant", 2.0, 2.0)])
def test_shapes_of_the_learning_rate(decay, half, end):
    s = Schedule(110, 1, 2.0, warmup=10, final_lr=0.0, decay=decay)
    assert [learning_rate(s, i) for i in (4, 10, 60, 110)] == pytest.approx([1.0, 2.0, half, end])


def test_an_unknown_decay_is_refused():
    with pytest.raises(BadInput, match="did you mean cosine"):
        Schedule(1, 1, 1.0, decay="cosin")


def test_automatic_precision_is_resolved_and_recorded(tmp_path):
    run = line_run(tmp_path, precision="auto")
    assert run.config["precision"] == run.schedule.precision == resolved_precision("auto") in ("no", "bf16")
