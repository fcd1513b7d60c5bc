"""Recipes that alternate, hooks, and masters: what comes when, what it may touch, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
import time
from functools import partial

import pytest
import torch
from torch import nn

from loop_cases import Game, Line, game_run, line_run, play, start, weights
from sfumato.errors import BadInput, SfumatoError
from sfumato.train.loop import Loose, Recipe, Run, Schedule, Turn
from sfumato.train.scale import LossScale

QUIET = {"warmup": 0, "decay": "constant", "clip_norm": 0.0, "ema": 0.0, "precision": "no", "track": "none"}


def everything(run: Run) -> torch.Tensor:
    parts = {**run.weights(), **run.average, **{n: m for one in run.updated for n, m in one.moments().items()}}
    return torch.cat([parts[name].detach().flatten().float() for name in sorted(parts)])


def test_turns_come_in_order_and_as_often_as_they_say():
    run = game_run(None, updates=5)
    history = run.fit(progress=False)
    judge, maker = "judge", "maker"
    assert run.recipe.calls == [
        (1, judge), (1, judge), (2, judge), (2, judge), (3, judge), (3, judge),
        (4, judge), (4, judge), (4, maker), (5, judge), (5, judge), (5, maker),
    ]  # fmt: skip
    assert {name: len(losses) for name, losses in history.items()} == {"judge/loss": 10, "maker/loss": 2}
    turn = Turn(name="t", loss=run.recipe.tell, every=3, first=1, times=2)
    assert [turn.comes(i) for i in range(8)] == [0, 2, 0, 0, 2, 0, 0, 2]


def test_the_game_is_won():
    game = Game(stay=0.0)
    game_run(None, updates=400, recipe=game, batch=64).fit(progress=False)
    with torch.no_grad():
        made = game.maker(torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)))
    assert abs(made.mean() - 2) < 0.3, "it began at 0 or so"
    assert all(p.abs().max() <= 2 for p in game.judge.parameters()), "weights are held where the hook holds them"


def test_surgery_leaves_nothing_that_opposes():
    game = Game()
    game_run(None, updates=30, recipe=game).fit(progress=False)
    assert len(game.dots) == 2 * 27 and all(dot >= -1e-7 for dot in game.dots)
    assert any(abs(dot) <= 1e-7 for dot in game.dots), "something did oppose"


def test_a_resumed_game_is_the_whole_one_bit_for_bit(tmp_path):
    """Optimisers of two kinds, copies, averages, losses: all go on."""
    whole, half = game_run(None, updates=40), game_run(tmp_path, updates=40)
    told = whole.fit(progress=False)
    for _ in range(17):
        half.one_step()
    half.save()
    again = game_run(tmp_path, updates=40)
    assert again.fit(progress=False) == told
    assert torch.equal(everything(again), everything(whole))
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1]).keys() >= {"judge/loss", "maker/lr"}


def test_a_killed_game_goes_on_to_the_same_bits(tmp_path):
    """kill -9 twice, at whatever moment it is."""
    whole = game_run(None)
    told = whole.fit(progress=False)
    for goal in (7, 21):
        process = start(play, str(tmp_path), {})
        deadline = time.time() + 60
        while process.is_alive() and time.time() < deadline and reached(tmp_path) < goal:
            time.sleep(0.005)
        process.kill()
        process.join()
        assert 0 < reached(tmp_path) < 60
    resumed = game_run(tmp_path)
    assert resumed.fit(progress=False) == told
    assert torch.equal(everything(resumed), everything(whole))


def reached(folder) -> int:
    try:
        return json.loads((folder / "checkpoint" / "run.json").read_text())["step"]
    except OSError:
        return 0


def test_micro_batches_change_nothing_but_rounding():
    one, cut = game_run(None, updates=20), game_run(None, updates=20, accumulate=3)
    for run in (one, cut):
        run.fit(progress=False)
    torch.testing.assert_close(everything(one), everything(cut), rtol=1e-3, atol=1e-5)


class Losses(Recipe):
    """One network, two losses: in one, or each by itself."""

    name = "losses"

    def __init__(self, apart: bool):
        torch.manual_seed(0)
        self.net, self.apart = nn.Linear(3, 2), apart

    def modules(self):
        return {"net": self.net}

    def batch(self, step, rng, size):
        return torch.randn(size, 3, generator=torch.Generator().manual_seed(step))

    def turns(self):
        first = lambda x, rng: (self.net(x)[:, 0].square().mean(), {})
        second = lambda x, rng: (3 * self.net(x)[:, 1].mean(), {})
        both = lambda x, rng: (first(x, rng)[0] + second(x, rng)[0], {})
        return [Turn(name="all", loss={"first": first, "second": second} if self.apart else both)]


def test_several_losses_add_up_unless_the_recipe_combines_them():
    runs = [Run(Losses(apart), Schedule(updates=9, batch=4, lr=0.1, **QUIET)) for apart in (False, True)]
    told = [run.fit(progress=False)["loss"] for run in runs]
    assert told[0] == pytest.approx(told[1], rel=1e-5)
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=1e-5, atol=1e-7)


class Projected(Line):
    """What the layer answers to ``known`` inputs stays, whatever AdamW's scaling, momentum and decay do."""

    known = torch.linalg.qr(torch.randn(2, 1, generator=torch.Generator().manual_seed(3)))[0]

    def gradients(self, turn, gradients):
        self.before = self.net[0].weight.detach().clone()
        gradients.pop("net.2.bias")
        return gradients

    def after_update(self, turn, step):
        weight, free = self.net[0].weight, torch.eye(2) - self.known @ self.known.T
        weight.copy_(self.before + (weight - self.before) @ free)


def test_updates_can_be_projected_and_parameters_left_out():
    line = Projected()
    first, bias = line.net[0].weight.detach().clone(), line.net[2].bias.detach().clone()
    line_run(None, recipe=line, weight_decay=0.1, ema=0.0).fit(progress=False)
    moved = line.net[0].weight.detach() - first
    assert (moved @ line.known).abs().max() < 1e-5 < 1e-2 < moved.abs().max()
    assert torch.equal(line.net[2].bias, bias), "a gradient that is left out changes nothing"


def test_a_run_in_memory_is_the_run_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside, outside = line_run(None), line_run(tmp_path / "run")
    assert inside.fit(progress=False) == outside.fit(progress=False)
    assert torch.equal(weights(inside), weights(outside)) and len(inside.history["loss"]) == 40
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with pytest.raises(SfumatoError, match=r"not finite at step 16 \(loss nan\): lower the learning rate$"):
        line_run(None, recipe=Line(blow_up_at=15)).fit(progress=False)


def test_training_leaves_the_global_randomness_alone():
    run, before = line_run(None, updates=3), torch.get_rng_state()
    run.fit(progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_process_at_a_time(tmp_path):
    from sfumato.files import held

    with held(tmp_path / "run"), pytest.raises(BadInput, match="another run is at work in"):
        line_run(tmp_path / "run", seed=1).fit(progress=False)
    assert list(tmp_path.iterdir()) == [], "neither left anything"
    line_run(tmp_path / "run", seed=1).fit(progress=False)


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="draws no pictures"):
        game_run(None, grid_every=5)
    with pytest.raises(ValueError, match="trains none of"):
        Run(Wrong(), Schedule(updates=1, batch=1, lr=1.0, **QUIET))
    with pytest.raises(ValueError, match="at least 1"):
        Turn(name="never", loss=Game().tell, every=0)
    with pytest.raises(NotImplementedError, match="neither its loss nor its turns"):
        Run(Silent(), Schedule(updates=1, batch=1, lr=1.0, **QUIET)).fit(progress=False)


class Silent(Recipe):
    name = "silent"

    def modules(self):
        return {"loose": Loose({"a.b": nn.Parameter(torch.ones(2))})}


class Wrong(Silent):
    def turns(self):
        return [Turn(name="wrong", loss=self.loss, trains=["a"])]


class Slopes(Silent):
    """Numbers of any precision with constant gradients, so that Adam moves each by the learning rate every time."""

    name = "slopes"

    def __init__(self, dtype: torch.dtype, shift: float = 0.0):
        self.x = nn.Parameter(torch.linspace(0.5, 2, 64).to(dtype))
        self.shift, self.seen = shift, []

    def modules(self):
        return {"loose": Loose({"down.x": self.x})}

    def turns(self):
        return [Turn(name="all", loss=self.loss, optimizer=partial(torch.optim.Adam, eps=0.0))]

    def loss(self, batch, rng):
        self.seen.append(self.x.dtype)
        return (1e-3 * self.x.float()).mean(), {}

    def after_update(self, turn, step):
        if step == 50:
            self.x[:8] += self.shift


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_updates_are_not_lost_in_half_precision(dtype, tmp_path):
    """1e-5 is far below what half precision can add to numbers of about 1."""
    slopes = Slopes(dtype, shift=0.25)
    start, run = slopes.x.detach().float(), Run(slopes, Schedule(updates=400, batch=1, lr=1e-5, **QUIET), tmp_path)
    run.fit(progress=False)
    # In float16 the first gradients overflow at the first scale, and their updates are left out.
    skipped = int(math.log2(run.scale.FIRST / run.scale.value)) if run.scale.needed else 0
    expected = start - (400 - skipped) * 1e-5
    expected[:8] += 0.25
    assert slopes.x.dtype == dtype and set(slopes.seen) == {dtype}
    (master,) = run.masters.values()
    torch.testing.assert_close(master.detach(), expected, rtol=0, atol=2e-3)  # the shift is that of rounded numbers
    torch.testing.assert_close(master.detach()[8:], expected[8:], rtol=0, atol=2e-5)
    assert torch.equal(slopes.x, master.to(dtype)) and (slopes.x[8:] != start[8:].to(dtype)).float().mean() > 0.3
    again = Slopes(dtype, shift=0.25)
    Run(again, Schedule(updates=400, batch=1, lr=1e-5, **QUIET), tmp_path).fit(progress=False)
    assert torch.equal(again.x, slopes.x), "masters are what a checkpoint holds"


class Steep(Slopes):
    """Gradients that overflow at the first scale, or are not finite at any."""

    def __init__(self, factor: float = 100.0):
        super().__init__(torch.float16)
        self.factor = factor

    def loss(self, batch, rng):
        return (self.factor * self.x.float()).mean(), {}


def test_an_update_that_is_left_out_ends_no_run(tmp_path):
    runs = []
    for every in (1, 100):
        folder = tmp_path / str(every)
        run = Run(Steep(), Schedule(updates=24, batch=1, lr=1e-5, checkpoint_every=every, **QUIET), folder)
        run.fit(progress=False)
        logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert logged[-1]["grad_norm"] == pytest.approx(100 / 8) and run.scale.value < run.scale.FIRST
        runs.append(run)
    assert "grad_norm" not in json.loads((tmp_path / "1" / "log.jsonl").read_text().splitlines()[0])
    many, few = (next(iter(run.masters.values())).detach() for run in runs)
    assert torch.equal(many, few)
    with pytest.raises(SfumatoError, match="not finite at step 1 "):
        Run(Steep(math.inf), Schedule(updates=3, batch=1, lr=1e-5, **QUIET)).fit(progress=False)


def test_the_scale_of_losses_follows_their_gradients():
    scale = LossScale(True)
    assert not scale.sound(torch.tensor(float("inf"))) and scale.value == 2.0**15
    for _ in range(scale.PATIENCE):
        assert scale.sound(torch.tensor(1.0))
    assert scale.value == 2.0**16
    kept = LossScale(True)
    kept.restore(scale.state())
    assert (kept.value, kept.streak) == (scale.value, scale.streak)
    plain = LossScale(False)
    assert plain.sound(torch.tensor(float("nan"))) and plain.value == 1, "the loop tells of it"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close(precision):
    """Forward passes in half precision, weights in float32."""
    full, mixed = line_run(None, recipe=Line(dropout=0)), line_run(None, recipe=Line(dropout=0), precision=precision)
    full.fit(progress=False)
    mixed.fit(progress=False)
    assert weights(mixed).dtype == torch.float32
    torch.testing.assert_close(weights(full), weights(mixed), rtol=0.1, atol=0.05)
    assert not torch.equal(weights(full), weights(mixed))
