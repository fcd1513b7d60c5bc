"""Optimal transport within a batch, as sLCT couples noise to latents: ours against POT and torchcfm, in one run.

    python benchmarks/coupling.py                            # batches of 256, 1,024 and 4,096 latents of 4x32x32
    python benchmarks/coupling.py --batches 256              # a batch of this size alone
    python benchmarks/coupling.py --threads 2                # as many threads for each

From latents and noise to the order of the rows, costs included. ``shortest paths`` is what ours is without scipy;
POT's is its exact solver (``emd``) on the matrix of squared distances, torchcfm's its ``OTPlanSampler("exact")`` with
its draw from the plan. What is not installed is left out with a line that says so (pip install POT torchcfm). All that
are exact must come to one cost, which is printed as a share of that of noise as it is drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.train.consistency import couple, shortest_paths
from timing import timed

Way = Callable[[], Tensor]
"""The order of the latents that goes with the noise as it stands."""
SLOW = 512
"""The largest batch on which numpy's own loop is timed."""


def ways(x: Tensor, noise: Tensor) -> dict[str, Way]:
    """What is there to compare, by name; ours first."""
    flat, free = x.flatten(1), noise.flatten(1)
    found: dict[str, Way] = {"ours": lambda: couple(x, noise)}
    if len(x) <= SLOW:
        found["ours, shortest paths"] = lambda: torch.from_numpy(
            shortest_paths(-(free.double() @ flat.double().T).numpy())
        )
    if find_spec("ot"):
        import ot

        def pot() -> Tensor:
            even = np.full(len(x), 1 / len(x))
            plan: Any = ot.emd(even, even, torch.cdist(free, flat).square().double().numpy(), numItermax=10_000_000)
            return torch.from_numpy(plan.argmax(1))

        found["POT, emd"] = pot
        if find_spec("torchcfm"):
            from torchcfm.optimal_transport import OTPlanSampler

            sampler = OTPlanSampler("exact")
            # It gives pairs that it draws from the plan, with replacement: there is no order of rows to judge.
            found["torchcfm, exact"] = lambda: sampler.sample_plan(free, flat)[1]
    return found


def cost(x: Tensor, noise: Tensor, order: Tensor) -> float:
    """Mean squared distance of pairs."""
    return float((x[order] - noise).double().flatten(1).square().sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--shape", type=int, nargs="+", default=[4, 32, 32], help="of a latent")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, package in (("POT", "ot"), ("torchcfm", "torchcfm"), ("scipy", "scipy")):
        if not find_spec(package):
            print(f"{name} is not installed and left out")
    shape = "x".join(map(str, args.shape))
    print(f"latents of {shape}, {args.threads} threads\n")
    print("| batch | way | ms | times ours | cost, of uncoupled |\n| ---: | --- | ---: | ---: | ---: |")
    for n in args.batches:
        rng = torch.Generator().manual_seed(n)
        x, noise = (torch.randn(n, *args.shape, generator=rng) for _ in range(2))
        there = ways(x, noise)
        seconds = timed(there, args.repeats)
        apart = cost(x, noise, torch.arange(n))
        for name, way in there.items():
            left = "-" if name.startswith("torchcfm") else f"{cost(x, noise, way()) / apart:.6f}"
            ratio = seconds[name] / seconds["ours"]
            print(f"| {n:,} | {name} | {1000 * seconds[name]:.1f} | {ratio:.2f} | {left} |", flush=True)


if __name__ == "__main__":
    main()
