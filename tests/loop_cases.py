"""A tiny recipe of the training loop, and processes to run it in, forked from a server that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import softplus

from sfumato.train import draw, processes, state
from sfumato.train.loop import Recipe, Run, Schedule, Turn


class Line(Recipe):
    """Fit a sum, with noise on its terms, a buffer that counts, and dropout so that hidden randomness would show."""

    name = "line"

    def __init__(self, blow_up_at: int = -1, dropout: float = 0.3, seen: list | None = None):
        torch.manual_seed(0)
        self.net, self.blow_up_at = nn.Sequential(nn.Linear(2, 8), nn.Dropout(dropout), nn.Linear(8, 1)), blow_up_at
        self.net.register_buffer("count", torch.zeros(()))
        self.seen = seen

    def modules(self):
        return {"net": self.net}

    def batch(self, step, rng, size):
        x = torch.stack([draw.uniform(size, rng), draw.strata(size, rng).float()], 1)
        if self.seen is not None:
            self.seen.append((step, x))
        return x, x.sum(1, keepdim=True) * (float("nan") if step == self.blow_up_at else 1)

    def loss(self, batch, rng):
        x, y = batch
        error = (self.net(x + 0.1 * draw.normal(x.shape, rng)) - y).square()
        return error.mean(), {"worst": error.mean()}

    def after_update(self, turn, step):
        self.net.count += step

    def grid(self, rng):
        self.drawn = (rng.initial_seed(), self.net.training)
        return self.net(torch.rand(4, 2, generator=rng)).sigmoid().reshape(4, 1, 1, 1).expand(4, 3, 4, 4)


def line_run(folder, updates=40, recipe=None, config=None, **changes) -> Run:
    settings = {"batch": 4, "lr": 0.01, "warmup": 5, "precision": "no", "checkpoint_every": 10, "track": "none"}
    return Run(recipe or Line(), Schedule(updates=updates, **{**settings, **changes}), folder and Path(folder), config)


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.params.values()])


def fit_slowly(folder: str, updates: int) -> None:
    """A run to be killed."""
    run = line_run(folder, updates)
    step = run.one_step
    run.one_step = lambda: (time.sleep(0.005), step())[1]
    run.fit(progress=False)


def fit(folder: str, changes: dict) -> None:
    """One process's part of a run without dropout."""
    run = line_run(folder, recipe=Line(dropout=0), **changes)
    run.fit(progress=False)
    # What a recipe does next: every process can use the networks as they were before.
    assert type(run.modules["net"]) is nn.Sequential
    assert all(type(p) is nn.Parameter for p in run.modules["net"].parameters())
    torch.save(run.modules["net"].state_dict(), Path(folder) / f"end-{run.accelerator.process_index}.pt")


def fit_sharded(folder: str, changes: dict) -> None:
    """As `fit`, sharded: accelerate offers that on GPUs only, so it is told here that it may."""

    def sharding(*args, **kwargs):
        accelerator = Accelerator(*args, **kwargs)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=20
        )
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        return accelerator

    processes.Accelerator = sharding
    prepare = state.parameters

    def checked(modules):
        params = prepare(modules)
        shards.append(all(isinstance(p, DTensor) and len(p.to_local()) < len(p) for n, p in params.items() if "0" in n))
        return params

    shards: list[bool] = []
    state.parameters = checked
    fit(folder, changes)
    assert shards[0], "the first layer's tensors are split over the processes"


def start(target: Callable, *args: object, env: dict[str, str] | None = None) -> multiprocessing.Process:
    """``target(*args)`` in a fork of a process that has imported the libraries."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sfumato.train.loop"])
    process = context.Process(target=_run, args=(target, args, env or {}), daemon=True)
    process.start()
    return process


def together(world: int, target: Callable, *args: object, **env: str) -> None:
    """``target(*args)`` in ``world`` processes that know of each other, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
    ranks = [{**base, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(world)]
    processes = [start(target, *args, env=rank) for rank in ranks]
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0] * world


def _run(target: Callable, args: tuple, env: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(env)
    target(*args)


class Game(Recipe):
    """Two turns on one-dimensional Gaussians: a maker shifts and scales noise, a judge tells it from N(2, 0.5^2).

    The judge comes twice as often, on batches of its own, and its weights are held to [-2, 2]. The maker has two
    losses, to fool the judge and to stay near zero; what the first takes from the second is projected away, tensor by
    tensor.
    """

    name = "game"

    def __init__(self, stay: float = 0.1):
        torch.manual_seed(1)
        self.maker = nn.Linear(1, 1)
        self.judge = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        self.slow = nn.Linear(1, 1)  # follows the maker by itself
        self.stay, self.calls, self.dots = stay, [], []

    def modules(self):
        return {"maker": self.maker, "judge": self.judge}

    def copies(self):
        return {"slow": self.slow}

    def turns(self):
        adam, sgd = partial(torch.optim.Adam, betas=(0.0, 0.9)), partial(torch.optim.SGD, momentum=0.5)
        return [
            Turn(name="judge", loss=self.tell, trains=["judge"], optimizer=adam, lr=0.02, times=2, fresh=True,
                 clip_value=0.5, clip_norm=0.0, ema=0.0),
            Turn(name="maker", loss={"fool": self.fool, "stay": self.near}, trains=["maker"], optimizer=sgd, first=3,
                 lr=lambda i: 0.05 / (1 + i / 100)),
        ]  # fmt: skip

    def batch(self, step, rng, size):
        return {"step": step, "real": 2 + 0.5 * draw.normal((size, 1), rng), "noise": draw.normal((size, 1), rng)}

    def tell(self, batch, rng):
        assert not self.maker.weight.requires_grad and all(p.requires_grad for p in self.judge.parameters())
        with torch.no_grad():
            made = self.maker(batch["noise"])
        real, made = self.judge(batch["real"]), self.judge(made)
        return (softplus(-real) + softplus(made)).mean(), {"right": (real > 0).float().mean()}

    def fool(self, batch, rng):
        assert not any(p.requires_grad for p in self.judge.parameters())
        batch["made"] = self.maker(batch["noise"]).detach()
        return softplus(-self.judge(self.maker(batch["noise"]))).mean(), {}

    def near(self, batch, rng):
        assert torch.equal(batch["made"], self.maker(batch["noise"])), "the losses of a turn are told the same batch"
        return self.stay * self.maker(batch["noise"]).square().mean(), {}

    def combine(self, turn, gradients):
        kept = {}
        for name, a in gradients["fool"].items():
            b = gradients["stay"][name]
            dot = (a * b).sum()
            kept[name] = a - dot / b.square().sum() * b if dot < 0 else a
            self.dots.append((kept[name] * b).sum())
        return kept

    def after_update(self, turn, step):
        self.calls.append((step, turn.name))
        if turn.name == "judge":
            for p in self.judge.parameters():
                p.clamp_(-2, 2)
        else:
            for mine, theirs in zip(self.slow.parameters(), self.maker.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)


def game_run(folder, updates=60, recipe=None, **changes) -> Run:
    settings = {"batch": 8, "lr": 0.01, "warmup": 0, "precision": "no", "checkpoint_every": 7, "track": "none"}
    return Run(recipe or Game(), Schedule(updates=updates, **{**settings, **changes}), folder and Path(folder))


def play(folder: str, changes: dict) -> None:
    """A game to be killed, or one process's part of it."""
    run = game_run(folder, **changes)
    step = run.one_step
    run.one_step = lambda: (time.sleep(0.005), step())[1]
    run.fit(progress=False)
    state = {**run.recipe.maker.state_dict(), **{f"judge.{k}": v for k, v in run.recipe.judge.state_dict().items()}}
    torch.save(state, Path(folder) / f"end-{run.accelerator.process_index}.pt")
