"""Blurring diffusion: what it does to sampling and to overfitting, and how it compares at equal compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data import oracle
from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.metrics.frechet import frechet_distance
from sfumato.noise.blurring import dct
from sfumato.pipeline import ImageModel
from sfumato.sample import S2N, ddpm
from sfumato.sample.times import uniform
from sfumato.train.blurring import Blurring

from .core import Claim, Experiment, Figures, Found
from .pixels import fresh, trained

SIDE, PICTURES, FRESH = 16, 256, 1000
"""Side of the pictures, how many are trained on, and how many others the samples are compared with."""
UPDATES, STEPS, PATHS = 600, 100, 64
RECIPES: dict[str, dict[str, Any]] = {
    "blurring": {},
    "gaussian": {"sigma_blur_max": 0.0},
    "predicting x0": {"prediction": "x0"},
}
"""The blur of 20 pixels that the paper has for 32 a side, halved with the side."""


def train(seed: int, **changes) -> ImageModel:
    """A small model of `PICTURES` pictures, trained by the recipe itself; the same budget for all."""
    settings = {"sigma_blur_max": 10.0, "channels": (16, 32, 32), "layers": 1, "attention": (), "dropout": 0.0}
    settings |= {"lr": 2e-3, "warmup": 50, "ema": 0.995, "batch": 32, "updates": UPDATES, "checkpoint_every": UPDATES}
    recipe = Blurring(size=SIDE, pictures=PICTURES, seed=seed, classes=False, **{**settings, **changes})
    return trained(recipe)


def seen(seed: int) -> Float[Tensor, "n 3 side side"]:
    """The pictures in [-1, 1] that the models of ``seed`` are trained on."""
    world = open_pictures("sketch", SIDE, seed=seed, count=PICTURES)
    return to_tensor([world.picture(i) for i in range(PICTURES)])


@torch.no_grad()
def losses(model: ImageModel, x: Float[Tensor, "n 3 side side"], seed: int) -> Float[np.ndarray, "n"]:
    """Squared error of the predicted noise of each picture, at 32 noise levels with the same noise for every model."""
    rng, found = torch.Generator().manual_seed(seed), []
    for i in range(32):
        eps, t = torch.randn(x.shape, generator=rng), torch.full((len(x),), (i + 0.5) / 32)
        z = model.process.diffuse(x, t, eps)
        guess = model.process.convert(model.denoiser(z, t), z, t, model.prediction, "eps")
        found.append((guess - eps).square().flatten(1).mean(1))
    return torch.stack(found).mean(0).double().numpy()


def gaps(model: ImageModel, seed: int) -> list[float]:
    """Loss of each fresh picture less that of a training picture, relative to the mean loss of fresh ones."""
    known, other = (losses(model, x, seed) for x in (seen(seed), fresh(SIDE, seed, PICTURES)))
    return list((other - known) / other.mean())


@torch.no_grad()
def overlap(model: ImageModel, seed: int) -> list[float]:
    """How much of the fine is decided while the coarse is: 0 if coarse comes first altogether, 1/2 if both together.

    On the way from noise, c is the correlation of z with the final picture over the coefficients of a band. The
    integral of c of the upper three quarters of the frequencies over c of the lowest quarter (without the mean), for
    each sample; how fast time runs along the way does not matter to it.
    """
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(PATHS, 3, SIDE, SIDE, generator=rng)
    path = [dct(z)]
    ddpm(model.guided(), z, uniform(STEPS), generator=rng, callback=lambda step, t, z: path.append(dct(z)))
    k = torch.arange(SIDE)
    order = torch.maximum(k[:, None], k)
    bands = [(order > 0) & (order < SIDE // 4), order >= SIDE // 4]
    low, high = (torch.stack([_correlation(u[..., band], path[-1][..., band]) for u in path]) for band in bands)
    return ((high[1:] + high[:-1]) / 2 * low.diff(dim=0)).sum(0).tolist()


def _correlation(a: Float[Tensor, "n channel band"], b: Float[Tensor, "n channel band"]) -> Float[Tensor, "n"]:
    return torch.nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double())


def distance(model: ImageModel, seed: int, sampler: Callable[..., Tensor] | str = "ddpm") -> float:
    """Frechet distance, in the oracle's features, of `PICTURES` samples from `FRESH` pictures never trained on."""
    seeds = range(seed * PICTURES, (seed + 1) * PICTURES)
    drawn = model.draw(None, seeds, sampling_steps=STEPS, scheduler=sampler)
    reader = oracle.load()
    with torch.no_grad():
        real = reader.features((fresh(SIDE, seed, FRESH) + 1) / 2)
        return frechet_distance(real.double(), reader.features(drawn).double())


def measure(seed: int, arm: str) -> Figures:
    """Train one of the three models, all on the same pictures; what it draws, and whether it overfits."""
    model = train(seed, **RECIPES[arm])
    found: dict[str, Any] = {"distance": distance(model, seed)}
    if arm != "predicting x0":
        found |= {"gaps": gaps(model, seed), "overlap": overlap(model, seed)}
    if arm == "blurring":
        found["fixed noise"] = distance(model, seed, partial(S2N(delta=1.0), final_noise=False))
    return found


def compare(arms: dict[str, Figures]) -> Found:
    """Pair by pair."""
    found = {name: arm["distance"] for name, arm in arms.items()}
    found["fixed noise"] = arms["blurring"]["fixed noise"]
    overfit = {name: arms[name]["gaps"] for name in ("blurring", "gaussian")}
    return {
        "coarse-to-fine": (arms["blurring"]["overlap"], arms["gaussian"]["overlap"]),
        "gap": (overfit["blurring"], overfit["gaussian"]),
        "posterior": ([found["blurring"]], [found["fixed noise"]]),
        "eps": ([found["blurring"]], [found["predicting x0"]]),
        "equal-compute": ([found["blurring"]], [found["gaussian"]]),
        "Frechet distance in the oracle's features": {name: {f"{STEPS} steps": x} for name, x in found.items()},
        "relative gap of the loss": {name: {"mean": float(np.mean(x))} for name, x in overfit.items()},
    }


_DISTANCE = (
    f"Frechet distance in the oracle's 128 features, {PICTURES} samples of {STEPS} steps from {FRESH} fresh pictures"
)

EXPERIMENT = Experiment(
    name="blurring",
    paper="arXiv 2209.05557",
    claims={
        "coarse-to-fine": Claim(
            "Sampling goes from coarse to fine, more so than with plain noise.",
            "blurring",
            "no blur, the same network and budget",
            "Along a sample's way, how far high frequencies are decided, integrated over how far low ones are.",
            "lower",
        ),
        "gap": Claim(
            "On 256 pictures, blurring overfits less.",
            "blurring",
            "no blur, the same network and budget",
            "Loss of a fresh picture less that of a training picture, relative to the mean loss of fresh ones.",
            "lower",
        ),
        "posterior": Claim(
            "The exact posterior, with a variance for each frequency, draws better than fresh noise at every step.",
            "exact posterior",
            "all of a step's noise fresh, the sampler of inverse heat dissipation",
            f"{_DISTANCE}; the same model.",
            "lower",
        ),
        "eps": Claim(
            "Predicting the noise is better than predicting the picture.",
            "predicting eps",
            "predicting x0, the same process, network and budget",
            f"{_DISTANCE}.",
            "lower",
        ),
        "equal-compute": Claim(
            "At equal compute, blurring draws better pictures than plain noise.",
            "blurring",
            "no blur, the same network and budget",
            f"{_DISTANCE}.",
            "lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="the paper's blur of 20 pixels for 32 a side, halved with the side. A first measurement held predicted "
    "pictures to [-1, 1] pixel by pixel, which turned samples grey; doing so frequency by frequency was found at seed "
    "0, as were 100 steps instead of 50, which left noise at the finest frequencies. Measured once more after the "
    "networks had been mended, which lost the pictures' brightness; before that, the last three were inconclusive. "
    "Then the updates were halved from 1,200, so that the entry takes ten minutes.",
    measure=measure,
    arms=tuple(RECIPES),
    compare=compare,
    cost={"blurring": 147, "gaussian": 120, "predicting x0": 102},
    notes="The paper's advantage in FID is one of long training (it hints at some 200,000 updates on CIFAR-10, and a "
    f"public run of half as many was behind), so at {UPDATES:,} updates the last claim is not expected to hold; it is "
    "measured all the same.",
)
