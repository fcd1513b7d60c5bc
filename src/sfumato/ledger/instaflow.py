"""InstaFlow: reflow makes paths straight, and a straightened flow distils better than the teacher itself.

On 25 narrow Gaussians in the plane, with a small network that is a rectified flow of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sfumato.distill.parts.flow import euler, one_step, straightness, velocity
from sfumato.distill.parts.reflow import OneStep, Reflow
from sfumato.noise import GaussianProcess, RectifiedFlow
from sfumato.train.loop import Run, Schedule

from .core import Claim, Experiment, Found
from .multistep_cm import BATCH, SAMPLES, Plane, train

PAIRS = 16_384
STEPS = 64
UPDATES, FEW = 1500, 100


class Flow(Plane):
    """The plane's network as a rectified flow."""

    process, prediction = GaussianProcess(RectifiedFlow()), "flow"
    pictures, unconditional = (None,), 0.0


@dataclass(frozen=True)
class Memory:
    """Pairs as `PairStore` gives them, not in files."""

    noise: Tensor
    clean: Tensor

    @property
    def count(self) -> int:
        return len(self.noise)

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.noise[rows], self.clean[rows]


def first_flow(seed: int, updates: int) -> Flow:
    """1-rectified flow: trained on the data and independent noise."""
    torch.manual_seed(seed)
    network = Flow()

    def loss(step: int, rng: torch.Generator) -> Tensor:
        x = network.batch(rng, BATCH)["x"]
        t, eps = torch.rand(BATCH, generator=rng), torch.randn(x.shape, generator=rng)
        return (network(network.process.diffuse(x, t, eps), t) - (eps - x)).square().mean()

    train(network, loss, updates, seed, 2e-3)
    return network


@torch.no_grad()
def pairs_of(flow: Flow, seed: int) -> Memory:
    """What a flow makes of noise, by Euler's rule."""
    noise = torch.randn(PAIRS, 2, generator=torch.Generator().manual_seed(20_000 + seed))
    return Memory(noise, euler(velocity(flow), noise, STEPS))


def trained(given: Flow, kind: Any, store: Memory, updates: int, seed: int) -> Flow:
    """A flow after a training from pairs, from the weights of ``given``."""
    network = copy.deepcopy(given)
    method = SimpleNamespace(first_time=0.0, reduction="mean", updates=updates, perceptual_updates=0)
    rest = (None,) if kind is OneStep else ()
    recipe = kind(method, SimpleNamespace(denoiser=network, network=network), network, store, *rest)
    schedule = Schedule(updates=updates, batch=BATCH, lr=1e-3, warmup=50, weight_decay=0.0, ema=0.998, seed=seed,
                        checkpoint_every=updates, track="none")  # fmt: skip
    Run(recipe, schedule).fit(progress=False)
    return network.eval()


@torch.no_grad()
def distances(flow: Flow, steps: int, seed: int, directions: int = 64) -> list[float]:
    """Wasserstein-1 distance of what a flow draws to data, along each of some directions."""
    rng = torch.Generator().manual_seed(10_000 + seed)
    data = flow.data.sample(SAMPLES, rng).float()
    made = euler(velocity(flow), torch.randn(data.shape, generator=rng), steps)
    angle = torch.rand(directions, generator=rng) * torch.pi
    lines = torch.stack([angle.cos(), angle.sin()])
    return ((data @ lines).sort(0).values - (made @ lines).sort(0).values).abs().mean(0).tolist()


@torch.no_grad()
def paths(flow: Flow, seed: int, groups: int = 16) -> tuple[list[float], list[float]]:
    """Straightness, and the squared distance that its pairs are apart, of groups of 128 paths."""
    noise = torch.randn(groups * 128, 2, generator=torch.Generator().manual_seed(30_000 + seed))
    v = velocity(flow)
    cost = (euler(v, noise, STEPS) - noise).square().sum(1)
    mean = lambda x: x.reshape(groups, -1).mean(1).tolist()
    return mean(straightness(v, noise, STEPS)), mean(cost)


@torch.no_grad()
def errors(flow: Flow, store: Memory, groups: int = 16) -> list[float]:
    """Squared error of one step on the pairs of a store, of each of some groups."""
    off = (one_step(velocity(flow), store.noise) - store.clean).square().sum(1)
    return off.reshape(groups, -1).mean(1).tolist()


def measure(seed: int, updates: int = UPDATES, first_updates: int = 3000) -> Found:
    """As many updates for the student of reflow and distillation as for direct distillation."""
    one = first_flow(seed, first_updates)
    store = pairs_of(one, seed)
    two = trained(one, Reflow, store, updates, seed)
    again = pairs_of(two, seed)
    ours = trained(two, OneStep, again, updates, seed)
    direct = trained(one, OneStep, store, 2 * updates, seed)
    few = min(FEW, updates)
    ways = (two, again), (one, store)
    soon = [distances(trained(flow, OneStep, pairs, few, seed), 1, seed) for flow, pairs in ways]
    (straight_1, cost_1), (straight_2, cost_2) = paths(one, seed), paths(two, seed)
    return {
        "distilled": (distances(ours, 1, seed), distances(direct, 1, seed)),
        "few": (soon[0], soon[1]),
        "error": (errors(ours, again), errors(direct, store)),
        "undistilled": (distances(two, 1, seed), distances(one, 1, seed)),
        "straight": (straight_2, straight_1),
        "cost": (cost_2, cost_1),
    }


_DISTANCE = "Wasserstein-1 distance of 8192 samples to as many data, along each of 64 directions."
_GROUPS = "in each of 16 groups of 128 paths."

EXPERIMENT = Experiment(
    name="instaflow",
    paper="arXiv 2309.06380",
    claims={
        "distilled": Claim(
            "In one step, reflow and distillation are closer to the data than direct distillation of as many updates.",
            "2-rectified flow, distilled", "1-rectified flow, distilled directly", _DISTANCE, "lower",
        ),
        "few": Claim(
            f"After as few as {FEW} updates of distillation the straightened flow is closer to the data.",
            "2-rectified flow, distilled", "1-rectified flow, distilled directly", _DISTANCE, "lower",
        ),
        "error": Claim(
            "A straightened flow's pairs can be learned in one step with less error.",
            "2-rectified flow, distilled", "1-rectified flow, distilled directly",
            "Squared error of one step on the pairs learned from, in each of 16 groups.", "lower",
        ),
        "undistilled": Claim(
            "Before any distillation, one Euler step of the straightened flow is closer to the data.",
            "2-rectified flow, 1 step", "1-rectified flow, 1 step", _DISTANCE, "lower",
        ),
        "straight": Claim(
            "Reflow makes paths straighter.", "2-rectified flow", "1-rectified flow",
            f"Mean squared deviation of the velocity from the path's mean velocity, {_GROUPS}", "lower",
        ),
        "cost": Claim(
            "Reflow does not make pairs cost more to carry over.", "2-rectified flow", "1-rectified flow",
            f"Mean squared distance of noise and end, {_GROUPS}", "lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned on any seed: settings as first written",
    measure=measure,
    cost=120,
    notes="In the plane there is no autoencoder, so distillation is by squared error alone, and with 3,000 updates in "
    "all both ways end at the distance of the flow that they learn from: of squared errors of a hundred-thousandth "
    f"nothing is left to tell apart. After {FEW} updates of distillation (reflow's own not counted) there is.",
)  # fmt: skip
