"""The training loop: same bits after a kill, refusals, finite losses, micro-batches, pictures and trackers."""

from __future__ import annotations

import json
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from loop_cases import Line, fit_slowly, line_run, start, weights
from sfumato.errors import BadInput, SfumatoError
from sfumato.train.ahead import ahead
from sfumato.train.schedule import Schedule, learning_rate, resolved_precision


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
    assert again.recipe.net.count == sum(range(41)), "buffers are part of the checkpoint"


def test_killed_run_goes_on_to_the_same_bits(tmp_path):
    """kill -9 at a random moment, then the same command; several times."""
    whole = line_run(tmp_path / "whole", updates=200)
    whole.fit(progress=False)
    folder, stopped, moment = tmp_path / "killed", [], random.Random(0)
    for _ in range(3):
        process = start(fit_slowly, str(folder), 200)
        deadline, goal = time.time() + 60, sum(stopped[-1:]) + 10
        while process.is_alive() and time.time() < deadline and reached(folder) < goal:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.2))
        process.kill()
        process.join()
        stopped.append(reached(folder))
    assert 0 < stopped[0] < 200
    resumed = line_run(folder, updates=200)
    resumed.fit(progress=False)
    assert torch.equal(weights(resumed), weights(whole))
    logged = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(10, 201, 10)), "no step is told twice"


def reached(folder) -> int:
    """The step of the run's checkpoint; the folder is renamed at times."""
    try:
        return json.loads((folder / "checkpoint/run.json").read_text())["step"]
    except OSError:
        return 0


def test_another_seed_sees_other_data_and_other_noise(tmp_path):
    seen = [[], [], []]
    runs = [line_run(tmp_path / str(i), recipe=Line(seen=seen[i]), seed=min(i, 1)) for i in range(3)]
    for run in runs:
        run.one_step()
    assert torch.equal(seen[1][0][1], seen[2][0][1]) and torch.equal(weights(runs[1]), weights(runs[2]))
    assert not torch.equal(seen[0][0][1], seen[1][0][1])


@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_micro_batches_change_nothing_but_rounding(accumulate, tmp_path):
    one = line_run(tmp_path / "a", batch=7, recipe=Line(dropout=0))
    cut = line_run(tmp_path / "b", batch=7, recipe=Line(dropout=0), accumulate=accumulate)
    for _ in range(20):
        a, b = one.one_step(), cut.one_step()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(one), weights(cut), rtol=1e-4, atol=1e-6)


def test_more_micro_batches_than_rows_are_refused():
    with pytest.raises(BadInput, match="cannot be cut into 5"):
        Schedule(updates=1, batch=4, lr=1.0, accumulate=5)


def test_changed_setting_is_named_and_refused(tmp_path):
    line_run(tmp_path).fit(progress=False)
    with pytest.raises(BadInput, match=r"lr=0\.01"):
        line_run(tmp_path, lr=0.02).fit(progress=False)
    with pytest.raises(BadInput, match="updates=40"):
        line_run(tmp_path, updates=50).fit(progress=False)


def test_a_run_that_goes_on_with_other_threads_says_so(tmp_path, recwarn):
    line_run(tmp_path, updates=10, decay="constant").fit(progress=False)
    line_run(tmp_path, updates=20, decay="constant").fit(progress=False)
    assert not recwarn.list, "nothing has changed"
    file = tmp_path / "checkpoint/run.json"
    about = json.loads(file.read_text())
    assert about["machine"]["threads"] == torch.get_num_threads() and about["machine"]["device"] == "cpu"
    about["machine"] |= {"threads": 99, "torch": "1.0"}
    file.write_text(json.dumps(about))
    line_run(tmp_path, updates=20, decay="constant").fit(progress=False)
    assert not recwarn.list, "there is nothing left to go on with"
    with pytest.warns(UserWarning, match=r"goes on otherwise than it began \(threads: 99, now \d+; torch: 1\.0, now"):
        line_run(tmp_path, updates=30, decay="constant").fit(progress=False)


def test_a_run_at_a_constant_rate_may_be_made_longer(tmp_path):
    line_run(tmp_path / "a", updates=10, decay="constant").fit(progress=False)
    longer, whole = (line_run(tmp_path / name, updates=20, decay="constant") for name in "ab")
    longer.fit(progress=False)
    whole.fit(progress=False)
    assert torch.equal(weights(longer), weights(whole))


class Modest(Line):
    """A line that has enough after nine updates, and counts how often it is asked."""

    asked = 0

    def enough(self, step):
        self.asked += 1
        return step == 9


def test_a_run_that_has_enough_stops_there_and_stays_stopped(tmp_path):
    short = line_run(None, updates=9, decay="constant")
    short.fit(progress=False)
    run = line_run(tmp_path, recipe=Modest(), decay="constant")
    assert run.fit(progress=False)["loss"] == short.history["loss"] and run.step == 9
    again = line_run(tmp_path, recipe=Modest(), decay="constant")
    again.fit(progress=False)
    assert (again.step, again.recipe.asked) == (9, 1) and again.history == run.history
    in_memory = line_run(None, recipe=Modest(), decay="constant")
    assert in_memory.fit(progress=False) == run.history
    assert all(torch.equal(x, y) for x, y in zip(in_memory.weights().values(), run.weights().values(), strict=True))


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    line_run(tmp_path, updates=1).fit(progress=False)
    file = tmp_path / "checkpoint/run.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "format"}))
    with pytest.raises(BadInput, match="of format 1"):
        line_run(tmp_path, updates=1).fit(progress=False)


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
        patched.setattr("sfumato.train.state.save_file", full_disk)
        run.save()
    again = line_run(tmp_path)
    again.resume()
    assert again.step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_learning_rate():
    s = Schedule(updates=100, batch=1, lr=2.0, warmup=10, final_lr=0.1)
    assert learning_rate(s, 0) == pytest.approx(0.2) and learning_rate(s, 10) == pytest.approx(2.0)
    assert learning_rate(s, 100) == pytest.approx(0.2)


@pytest.mark.parametrize(("decay", "half", "end"), [("cosine", 1.0, 0.0), ("linear", 1.0, 0.0), ("constant", 2.0, 2.0)])
def test_shapes_of_the_learning_rate(decay, half, end):
    s = Schedule(updates=110, batch=1, lr=2.0, warmup=10, final_lr=0.0, decay=decay)
    assert [learning_rate(s, i) for i in (4, 10, 60, 110)] == pytest.approx([1.0, 2.0, half, end])


def test_an_unknown_decay_is_refused():
    with pytest.raises(BadInput, match="did you mean cosine"):
        Schedule(updates=1, batch=1, lr=1.0, decay="cosin")


def test_automatic_precision_is_resolved_and_recorded(tmp_path):
    run = line_run(tmp_path, precision="auto")
    assert run.config["precision"] == run.schedule.precision == resolved_precision("auto") in ("no", "bf16")


@pytest.mark.parametrize("capability, expected", [(None, "no"), ((7, 5), "no"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_automatic_precision_is_bf16_on_gpus_that_have_it_only(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert resolved_precision("auto") == expected and resolved_precision("fp16") == "fp16"


def test_optimiser_settings_reach_the_optimiser(tmp_path):
    run = line_run(tmp_path, betas=(0.5, 0.6), eps=0.1, weight_decay=0.3)
    group = run.optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 0.1, 0.3)


def test_runs_of_different_precision_in_one_process(tmp_path):
    losses = [line_run(tmp_path / p, precision=p).one_step()["loss"].item() for p in ("no", "bf16", "no")]
    assert losses[0] == losses[2] != losses[1] == pytest.approx(losses[0], rel=0.05)


def test_averages_are_an_exponential_mean_of_the_weights(tmp_path):
    run = line_run(tmp_path, ema=0.5)
    mean = weights(run)
    for i in range(12):
        run.one_step()
        mean = mean + (weights(run) - mean) * (1 - min(0.5, (1 + i) / (10 + i)))
    assert torch.allclose(torch.cat([a.flatten() for a in run.average.values()]), mean, atol=1e-6)


def test_grids_show_the_averaged_weights_and_leave_the_run_as_it_was(tmp_path):
    plain, shown = line_run(tmp_path / "a"), line_run(tmp_path / "b", grid_every=20)
    plain.fit(progress=False)
    shown.fit(progress=False)
    assert torch.equal(weights(plain), weights(shown))
    files = sorted((tmp_path / "b" / "grids").iterdir())
    assert [f.name for f in files] == ["0000020.png", "0000040.png"]
    seed, training = shown.recipe.drawn
    assert not training and shown.recipe.net.training, "drawn in evaluation mode"
    # Since the end of fit the networks hold the averaged weights.
    pictures = shown.recipe.net.eval() and shown.recipe.grid(torch.Generator().manual_seed(seed))
    level = np.asarray(Image.open(files[-1]))[5, 5, 0]
    assert level == round(pictures[0, 0, 0, 0].item() * 255)


def test_tensorboard_is_told(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line_run(tmp_path, track="auto", grid_every=40).fit(progress=False)
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(file)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [10, 20, 30, 40]
    assert {"grad_norm", "lr", "worst", "pictures_per_second"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(BadInput, match="'nobody'"):
        line_run(tmp_path, track="nobody").fit(progress=False)


def test_the_log_tells_speed_and_time_left(tmp_path):
    line_run(tmp_path).fit(progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[0]["seconds_left"] >= rows[-1]["seconds_left"] == 0 and rows[0]["pictures_per_second"] > 0


def test_every_network_is_compiled_when_asked(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    run = line_run(tmp_path, compile=True)
    assert compiled == [run.recipe.net]


def test_batches_come_in_order_from_threads_that_are_a_little_ahead():
    begun, started = [], []

    def work(i, pause):
        begun.append(i)
        time.sleep(pause)
        return i

    jobs = ((i, 0.02 if i % 3 == 0 else 0.0) for i in range(30))
    found = ahead(work, jobs, 3, lambda: started.append(0))
    assert [next(found) for _ in range(10)] == list(range(10))
    assert max(begun) <= 9 + 6 and 1 <= len(started) <= 3
    found.close()
    assert len(begun) < 30, "what nobody waits for is not done"


def test_what_goes_wrong_in_a_thread_is_told_in_its_turn():
    found = ahead(lambda i: 1 // (2 - i), ((i,) for i in range(5)), 2, lambda: None)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_a_run_whose_batches_come_from_threads_equals_one_without(tmp_path, monkeypatch):
    """What a GPU gets, with the CPU in its place."""
    plain, threaded = (line_run(tmp_path / name, accumulate=2) for name in "ab")
    plain.fit(progress=False)
    threads = set()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: threads.add(threading.get_ident()))
    monkeypatch.setattr("sfumato.train.loop.pinned", lambda batch: batch)
    monkeypatch.setattr("sfumato.train.loop.send_to_device", lambda batch, device, non_blocking: batch)
    with monkeypatch.context() as patched:
        patched.setattr(threaded, "device", SimpleNamespace(type="cuda"))
        threaded.data = threaded._batches()
    threaded.fit(progress=False)
    assert torch.equal(weights(plain), weights(threaded))
    assert threads and threading.get_ident() not in threads
