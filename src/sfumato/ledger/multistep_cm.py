"""Multistep consistency: more segments are better at equal training, and a teacher beats the data alone.

On 25 narrow Gaussians in the plane, where a diffusion model needs many steps, with a small network; and, for aDDIM, on
the embedded pipeline, since it is about the many dimensions of pictures.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.distill.multistep_cm import MultistepCM, MultistepTraining
from sfumato.noise import Cosine, GaussianProcess
from sfumato.noise.analytic import GaussianMixture
from sfumato.sample import ddim
from sfumato.sample.times import uniform
from sfumato.train.loop import Schedule, learning_rate

from .core import Claim, Experiment, Found, Pair
from .erasure import sketch

STEPS = (1, 2, 4, 8)
BATCH = 256
SAMPLES = 8192
ADDIM_STEPS = (8, 16, 32)


class Plane(nn.Module):
    """A network of points in the plane, predicting v: also a `Denoiser`, and data for `MultistepTraining`."""

    process, prediction = GaussianProcess(Cosine()), "v"
    corners = torch.cartesian_prod(*[torch.linspace(-1.5, 1.5, 5)] * 2)
    data = GaussianMixture.isotropic(corners, 0.05)

    def __init__(self, width: int = 128):
        super().__init__()
        self.frequencies = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
        self.layers = nn.Sequential(
            nn.Linear(14, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, z: Tensor, t: Any, cond: Any = None) -> Tensor:
        # The angle of the noise level, which lies in [0, pi / 2].
        angle = torch.atan(torch.exp(-self.process.schedule.logsnr(t) / 2)).float().expand(len(z))
        waves = angle[:, None] * self.frequencies
        return self.layers(torch.cat([z.float(), waves.sin(), waves.cos()], dim=1)).to(z.dtype)

    def batch(self, rng: torch.Generator, size: int) -> dict[str, Tensor]:
        return {"x": self.data.sample(size, rng).float(), "rows": torch.arange(size), "bare": torch.zeros(size)}

    def conditioning(self, rows: Tensor, bare: Tensor) -> None:
        return None


def train(network: Plane, loss: Any, updates: int, seed: int, lr: float) -> None:
    """AdamW's updates on ``loss(step, rng)``; the network ends with its averaged weights."""
    schedule = Schedule(updates=updates, batch=BATCH, lr=lr, warmup=50)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    average = copy.deepcopy(network)
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, i)
        optimizer.zero_grad()
        loss(i, torch.Generator().manual_seed(seed * 1_000_000 + i)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        for mean, now in zip(average.parameters(), network.parameters(), strict=True):
            mean.data.lerp_(now.data, 1 - min(0.998, (1 + i) / (10 + i)))
    network.load_state_dict(average.state_dict())


def teacher(seed: int, updates: int) -> Plane:
    """A diffusion model of the points."""
    torch.manual_seed(seed)
    network = Plane()

    def loss(step: int, rng: torch.Generator) -> Tensor:
        x = network.batch(rng, BATCH)["x"]
        t, eps = torch.rand(BATCH, generator=rng), torch.randn(x.shape, generator=rng)
        z = network.process.diffuse(x, t, eps)
        return (network(z, t) - network.process.convert(eps, z, t, "eps", "v")).square().mean()

    train(network, loss, updates, seed, 2e-3)
    return network


def student(given: Plane, mode: Literal["cd", "ct"], segments: int, updates: int, seed: int) -> Plane:
    """A multistep consistency model of ``segments`` segments, from the weights of ``given``."""
    network = copy.deepcopy(given)
    method = MultistepCM(
        mode=mode, sampling_steps=segments, updates=updates, batch=BATCH, anneal=updates // 2, first_teacher_steps=32,
        last_teacher_steps=256, eta=0.0, cfg_scale=1.0,
    )  # fmt: skip
    side = lambda net: SimpleNamespace(denoiser=net, network=net, defaults={}, unconditional=lambda n: None)
    recipe = MultistepTraining(method, side(given), side(network), network)
    train(network, lambda i, rng: recipe.loss(recipe.batch(i, rng, BATCH), rng)[0], updates, seed, 5e-4)
    return network


@torch.no_grad()
def distances(network: Plane, steps: int, seed: int, directions: int = 64) -> list[float]:
    """Wasserstein-1 distance of samples to data along each of some directions."""
    rng = torch.Generator().manual_seed(10_000 + seed)
    data = network.data.sample(SAMPLES, rng).float()
    made = ddim(network, torch.randn(data.shape, generator=rng), uniform(steps))
    angle = torch.rand(directions, generator=rng) * torch.pi
    lines = torch.stack([angle.cos(), angle.sin()])
    return ((data @ lines).sort(0).values - (made @ lines).sort(0).values).abs().mean(0).tolist()


@torch.no_grad()
def variances(seed: int, steps: int, groups: int = 8, size: int = 16) -> Pair:
    """How far the spread of the embedded pipeline's latents is from the data's, with aDDIM and with DDIM.

    For each group of pictures |log(variance of their latents / variance of the data's)|, no guidance.
    """
    pipe, n = sketch(), groups * size
    pictures = open_pictures("sketch", pipe.size, seed=2000 + seed, count=n)
    latents = torch.cat([pipe.encode_image(to_tensor([pictures.picture(i)])) for i in range(n)])
    target = latents.var(dim=0).mean().log()
    found = []
    for scheduler in ("addim", "ddim"):
        parts = []
        for start in range(0, n, size):
            rows = range(start, start + size)
            captions = [pictures.caption(i) for i in rows]
            ends, _ = pipe.trajectory(captions, [seed * n + i for i in rows], sampling_steps=steps, stop_after=steps,
                                      scheduler=scheduler, cfg_scale=1.0)  # fmt: skip
            parts.append(float((ends.var(dim=0).mean().log() - target).abs()))
        found.append(parts)
    return found[0], found[1]


def measure(seed: int, teacher_updates: int = 3000, updates: int = 2000) -> Found:
    """One teacher, students of 1, 2, 4 and 8 segments, and one trained from the data alone."""
    given = teacher(seed, teacher_updates)
    made = {s: distances(student(given, "cd", s, updates, seed), s, seed) for s in STEPS}
    alone = distances(student(given, "ct", 1, updates, seed), 1, seed)
    result = {f"{2 * s}-{s}": (made[2 * s], made[s]) for s in STEPS[:-1]}
    result["teacher"] = made[1], alone
    result["untouched"] = made[4], distances(given, 4, seed)
    return result | {f"addim-{n}": variances(seed, n) for n in ADDIM_STEPS}


_DISTANCE = "Wasserstein-1 distance of 8192 samples to as many data, along each of 64 directions."
_SPREAD = "|log(variance of latents / variance of the data's)|, in each group of 16 pictures without guidance."


def _more(s: int) -> Claim:
    return Claim(
        f"At equal training a student of {2 * s} steps is closer to the data than one of {s}.",
        f"multistep-cm, {2 * s} steps", f"multistep-cm, {s} steps", _DISTANCE, "lower",
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="multistep-cm",
    paper="arXiv 2403.06807",
    claims={
        **{f"{2 * s}-{s}": _more(s) for s in STEPS[:-1]},
        "teacher": Claim(
            "At equal training, distillation is closer to the data than consistency training from the data alone.",
            "multistep-cm cd, 1 step", "multistep-cm ct, 1 step", _DISTANCE, "lower",
        ),
        "untouched": Claim(
            "The student is closer to the data than its teacher in as many DDIM steps.",
            "multistep-cm, 4 steps", "teacher, 4 DDIM steps", _DISTANCE, "lower",
        ),
        **{
            f"addim-{n}": Claim(
                f"In {n} steps aDDIM keeps more of the data's variance than DDIM.",
                f"aDDIM, {n} steps", f"DDIM, {n} steps", _SPREAD, "lower",
            )
            for n in ADDIM_STEPS
        },
    },
    seeds=(1, 2, 3),
    tuning="learning rates and teacher steps on seed 0; a DDIM teacher for the students, the paper's eta for aDDIM",
    measure=measure,
    cost=200,
)  # fmt: skip
