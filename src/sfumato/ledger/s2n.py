"""S2N: with a learnt, imperfect score some fresh noise between DDIM's none and DDPM's is better than both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.data import oracle
from sfumato.data.cases import balanced
from sfumato.data.sketch import prompt
from sfumato.data.world import WORDS
from sfumato.metrics.alignment import oracle_alignment
from sfumato.noise import Cosine, GaussianProcess
from sfumato.noise.analytic import GaussianMixture
from sfumato.noise.process import Prediction
from sfumato.sample import S2N
from sfumato.sample.times import karras, logsnr, uniform

from .core import Claim, Experiment, Found
from .erasure import sketch

PROCESS = GaussianProcess(Cosine(-10, 10))
GRIDS = {
    "log-SNR": lambda n: logsnr(PROCESS.schedule, n),
    "t": uniform,
    "kappa": lambda n: karras(PROCESS.schedule, n),
}
STEPS = (10, 25, 50, 100, 200)
CLAIMED = (50, 100, 200)
RHOS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
CHOSEN = {50: 0.25, 100: 0.25, 200: 0.25}
"""The rho of each number of steps, by `choose` on the tuning seeds."""
TUNING = (101, 102, 103)
POINTS, REPEATS = 2000, 4
TRAINED_ON, UPDATES, WIDTH = 20_000, 4000, 64
PICTURES, SKETCH_STEPS, SKETCH_RHO = 24, 50, 0.5


def ring() -> GaussianMixture:
    """Eight round modes on a circle, not equally likely."""
    angles = 2 * torch.pi * torch.arange(8, dtype=torch.float64) / 8
    return GaussianMixture.isotropic(torch.stack([angles.cos(), angles.sin()], 1), 0.1, torch.arange(1.0, 9.0))


@dataclass(eq=False)
class Learned:
    """A small network's guess of the noise, as a `Denoiser`."""

    network: nn.Module
    process: GaussianProcess = PROCESS
    prediction: Prediction = "eps"

    def __call__(self, z: Float[Tensor, "batch 2"], t: Tensor | float, cond: None = None) -> Float[Tensor, "batch 2"]:
        level = self.process.schedule.logsnr(t).to(z).reshape(-1, 1) / 10
        waves = torch.cat([level, (2 * level).sin(), (2 * level).cos(), (5 * level).sin(), (5 * level).cos()], 1)
        return self.network(torch.cat([z, waves.expand(len(z), -1)], 1))


def train(seed: int) -> Learned:
    """A score that is wrong in the usual ways: finite data, a small network, a short training."""
    rng = torch.Generator().manual_seed(seed)
    data = ring().sample(TRAINED_ON, rng).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(7, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)]
        network = nn.Sequential(*layers, nn.SiLU(), nn.Linear(WIDTH, 2))
    model, optimizer = Learned(network), torch.optim.Adam(network.parameters(), 2e-3)
    for i in range(UPDATES):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - i / UPDATES)
        x = data[torch.randint(len(data), (256,), generator=rng)]
        t = torch.rand(256, generator=rng, dtype=torch.float64)
        eps = torch.randn(x.shape, generator=rng)
        loss = (model(PROCESS.diffuse(x, t, eps), t) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def sliced_wasserstein(x: Float[Tensor, "n 2"], y: Float[Tensor, "n 2"], directions: int = 64) -> float:
    """Mean, over evenly spread directions, of the distance W1 of the two samples' projections."""
    angles = torch.pi * torch.arange(directions) / directions
    lines = torch.stack([angles.cos(), angles.sin()])
    return float((x.float() @ lines).sort(dim=0).values.sub((y.float() @ lines).sort(dim=0).values).abs().mean())


@torch.no_grad()
def distances(model: Learned, seed: int, rule: S2N, steps: int, grid: str = "log-SNR") -> list[float]:
    """Of samples from fresh exact draws, in `REPEATS` repetitions; the same start and draws for every rule."""
    found = []
    for i in range(REPEATS):
        rng = torch.Generator().manual_seed(1000 * seed + i)
        truth, z = ring().sample(POINTS, rng), torch.randn(POINTS, 2, generator=rng)
        found.append(sliced_wasserstein(rule(model, z, GRIDS[grid](steps), generator=rng), truth))
    return found


def rules() -> dict[str, tuple[S2N, str]]:
    """The whole grid: rho, what is frozen, the weight of the deterministic step, and the spacing of the times."""
    grid = {f"rho {rho:g}": (S2N(rho=rho), "log-SNR") for rho in RHOS}
    for freeze in (0.0, 1.0):
        grid |= {f"rho {rho:g}, freeze {freeze:g}": (S2N(rho=rho, freeze=freeze), "log-SNR") for rho in RHOS if rho}
    grid |= {f"rho 0, gamma_w {g:g}": (S2N(rho=0, gamma_w=g), "log-SNR") for g in (-0.1, -0.05, 0.05, 0.1)}
    grid |= {"delta 0.5": (S2N(delta=0.5), "log-SNR"), "rho 0.5, order 2": (S2N(order=2), "log-SNR")}
    return grid | {f"rho {rho:g}, even in {g}": (S2N(rho=rho), g) for g in ("t", "kappa") for rho in RHOS}


def choose(seeds: tuple[int, ...] = TUNING) -> dict[int, float]:
    """For each number of steps the rho strictly between 0 and 1 that is best on models and data of other seeds."""
    models = {seed: train(seed) for seed in seeds}
    between = [rho for rho in RHOS if 0 < rho < 1]
    worth = lambda rho, n: float(np.mean([distances(m, s, S2N(rho=rho), n) for s, m in models.items()]))
    return {n: min(between, key=lambda rho: worth(rho, n)) for n in CLAIMED}


def aligned(seed: int, rule: S2N) -> list[float]:
    """For each prompt the share of its attributes that the oracle finds in the embedded pipeline's picture."""
    rng = torch.Generator().manual_seed(seed)
    asked = {name: balanced(words, PICTURES, rng) for name, words in WORDS.items()}
    prompts = [prompt(**{name: words[i] for name, words in asked.items()}) for i in range(PICTURES)]
    seeds = range(seed * PICTURES, (seed + 1) * PICTURES)
    pictures = sketch().draw(prompts, seeds, sampling_steps=SKETCH_STEPS, scheduler=rule, batch=16)
    return oracle_alignment(oracle.load()(pictures), oracle.WORDS, prompts).tolist()


def measure(seed: int) -> Found:
    """Train a score, sample the whole grid, and draw the same prompts from the embedded pipeline."""
    model = train(seed)
    grid = rules().items()
    found = {(name, n): distances(model, seed, rule, n, where) for name, (rule, where) in grid for n in STEPS}
    together = lambda names: [x for n in CLAIMED for x in found[names[n], n]]
    chosen = together({n: f"rho {rho:g}" for n, rho in CHOSEN.items()})
    pictures = {rho: aligned(seed, S2N(rho=rho)) for rho in (0.0, SKETCH_RHO, 1.0)}
    return {
        "ddim": (chosen, together(dict.fromkeys(CLAIMED, "rho 0"))),
        "ddpm": (chosen, together(dict.fromkeys(CLAIMED, "rho 1"))),
        "few": (found["rho 0", 10], found["rho 1", 10]),
        "sketch-ddim": (pictures[SKETCH_RHO], pictures[0.0]),
        "sketch-ddpm": (pictures[SKETCH_RHO], pictures[1.0]),
        "sliced W1 by number of steps": {
            name: {str(n): float(np.mean(found[name, n])) for n in STEPS} for name, _ in grid
        },
        f"alignment on the embedded pipeline, {SKETCH_STEPS} steps": {
            f"rho {rho:g}": {"share of attributes": float(np.mean(x))} for rho, x in pictures.items()
        },
    }


_W1 = "Sliced Wasserstein distance (W1, 64 directions) of 2,000 samples from 2,000 fresh draws, eight modes in 2-D"
_SHARE = f"Share of the attributes named in the prompt that the oracle reads off the picture, {SKETCH_STEPS} steps."

EXPERIMENT = Experiment(
    name="s2n",
    paper="arXiv 2408.04221",
    claims={
        "ddim": Claim(
            "With a learnt score and 50 to 200 steps, some fresh noise is better than none.",
            "rho chosen between 0 and 1",
            "rho = 0 (DDIM)",
            f"{_W1}; 50, 100 and 200 steps together.",
            "lower",
        ),
        "ddpm": Claim(
            "With a learnt score and 50 to 200 steps, less noise than DDPM's is better.",
            "rho chosen between 0 and 1",
            "rho = 1 (DDPM)",
            f"{_W1}; 50, 100 and 200 steps together.",
            "lower",
        ),
        "few": Claim(
            "With 10 steps noise only harms.",
            "rho = 0 (DDIM)",
            "rho = 1 (DDPM)",
            f"{_W1}; 10 steps.",
            "lower",
        ),
        "sketch-ddim": Claim(
            "On the embedded pipeline, half of DDPM's noise draws what is asked for better than none.",
            "rho = 0.5",
            "rho = 0 (DDIM)",
            _SHARE,
        ),
        "sketch-ddpm": Claim(
            "On the embedded pipeline, half of DDPM's noise draws what is asked for better than all of it.",
            "rho = 0.5",
            "rho = 1 (DDPM)",
            _SHARE,
        ),
    },
    seeds=(1, 2, 3, 4),
    tuning=f"the rho of each number of steps by `choose` on the seeds {TUNING}, whose models, data and noise are their "
    f"own: {CHOSEN}; on the embedded pipeline rho is the default, untuned",
    measure=measure,
    cost=200,
    notes="Every seed trains its own network (64 wide, 4,000 updates on 20,000 points). freeze is what is held fixed "
    "along a step (1 + rho^2, the picture, unless it says otherwise), gamma_w lengthens or shortens deterministic "
    "steps, delta is the share of fresh noise in each step; times are even in log-SNR unless it says otherwise.",
)
