"""GOAR: a dense direction against one axis and chance, where the ranking of values cannot tell them apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sfumato.explain.goar import GOAR

from .core import Claim, Experiment, Figures, Found

SIZE = 20
TRAINED = 1000
MEASURED = 400
RUNS = 2
STRENGTHS = {"goar": (0.05, 0.1, 0.2, 0.4, 0.8), "roar": (0.1, 0.3, 0.5, 0.7, 0.9)}


def world(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal vectors, their classes, and the direction whose sign of the product these are: all of its
    entries are equally large, so that no ranking of values is better than another."""
    rng = torch.Generator().manual_seed(seed)
    direction = (2.0 * torch.randint(2, (SIZE,), generator=rng) - 1) / SIZE**0.5
    x = torch.randn(TRAINED + MEASURED, 1, 1, SIZE, generator=rng)
    return x, (x.flatten(1) @ direction > 0).long(), direction


def measure(seed: int, arm: str) -> Figures:
    """Errors, as a share, of each attribution under one metric."""
    x, y, direction = world(seed)
    layer = nn.Linear(SIZE, 2)
    layer.weight.data, layer.bias.data = 10 * torch.stack([-direction, direction]), torch.zeros(2)
    axis = torch.zeros(SIZE)
    axis[0] = direction[0].sign()
    # What ties is ranked by its place: without this both attributions would be ranked alike, and ROAR could not differ.
    axis += 1e-6 * torch.randn(SIZE, generator=torch.Generator().manual_seed(10_000 + seed))

    def along(way: Tensor) -> Any:
        return lambda network, some, classes, rng: (2.0 * classes - 1)[:, None, None, None] * way.view(1, 1, 1, SIZE)

    method = GOAR(
        metric="goar" if arm == "goar" else "roar", strengths=STRENGTHS[arm], attributions=("gradient", "random"),
        runs=RUNS, updates=200, lr=0.03, seed=seed, shown=0,
    )  # fmt: skip
    found = method.run(
        nn.Sequential(nn.Flatten(), layer).eval(), x[:TRAINED], y[:TRAINED], test=(x[TRAINED:], y[TRAINED:]),
        others={"one axis": along(axis)},
    )  # fmt: skip
    told = found["attributions"]
    errors = {m: [p["retrained"]["value"] for p in told[m]["curve"]] for m in told}
    return {"errors": errors, "leakage": {m: told[m]["leakage"] for m in told}}


def compare(arms: dict[str, Figures]) -> Found:
    """The dense direction against the axis, and both metrics' gaps."""
    mean = {arm: {m: sum(e) / len(e) for m, e in found["errors"].items()} for arm, found in arms.items()}
    gaps = {arm: abs(of["gradient"] - of["one axis"]) for arm, of in mean.items()}
    return {
        "separates": ([mean["goar"]["gradient"]], [mean["goar"]["one axis"]]),
        "beats chance": ([mean["goar"]["gradient"]], [mean["goar"]["random"]]),
        "where ROAR does not": ([gaps["goar"]], [gaps["roar"]]),
        "errors": mean,
        "leakage probe": {arm: found["leakage"] for arm, found in arms.items()},
    }


EXPERIMENT = Experiment(
    name="goar",
    paper="arXiv 2407.12401",
    claims={
        "separates": Claim(
            "GOAR prefers the dense direction that decides the label to a single axis.",
            "the direction", "one axis", "Errors after retraining, mean over lengths (share).",
        ),
        "beats chance": Claim(
            "GOAR prefers that direction to a random one.",
            "the direction", "random", "Errors after retraining, mean over lengths (share).",
        ),
        "where ROAR does not": Claim(
            "The two attributions are further apart under GOAR than under ROAR.",
            "GOAR", "ROAR", "Difference of the mean errors of the direction and of one axis (share, absolute).",
        ),
    },
    seeds=(1, 2, 3, 4, 5),
    tuning="nothing was tuned on any seed; the grids are the method's. After a first run the axis's ties are broken by "
    "chance: by their place both attributions had the same ranks, and no difference under ROAR could have been seen.",
    measure=measure,
    arms=("goar", "roar"),
    compare=compare,
    cost=20,
    notes=f"{SIZE} dimensions, {TRAINED} vectors to train on, {MEASURED} to measure on, a linear classifier, {RUNS} "
    "retraining seeds at each strength, no projector: the data fill the space. The classes are moved towards each "
    "other and, at large lengths, past each other, where errors fall again.",
)  # fmt: skip
