"""What a search for jumps costs, and what it saves: Jump Your Steps on the chain of the ledger, whose model is exact.

    python benchmarks/jumps.py                    # masked tokens, 4, 8 and 16 steps
    python benchmarks/jumps.py --process uniform

One search serves all numbers of steps. For each, the number of equal steps is looked for that draws as well: the least
one, by doubling and halving, whose samples are as near to the chain (total variation of pairs) as those of the searched
steps. Costs are sequences through the network, which do not depend on the machine; a search has paid for itself after
as many sequences drawn as stand in the last column. Seconds are of this machine and this model, whose calls are cheap.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfumato.ledger.jys import DRAWN, LENGTH, PROCESSES, countdown, equal, pairs
from sfumato.noise import ChainDenoiser
from sfumato.sample import JYS
from sfumato.sample.tokens import euler


class Counted:
    """A denoiser that counts the sequences that it is given."""

    def __init__(self, denoiser: ChainDenoiser):
        self.denoiser, self.rows = denoiser, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        self.rows += len(x)
        return self.denoiser(x, t, cond)


def least(good: Callable[[int], bool], first: int, most: int) -> int | None:
    """The least number from ``first`` on that is good, if those above a good one are; None beyond ``most``."""
    low, high = first - 1, first
    while not good(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", choices=PROCESSES, default="masked")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16], help="powers of two")
    parser.add_argument("--most", type=int, default=512, help="the largest number of equal steps that is tried")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)

    denoiser = Counted(ChainDenoiser(PROCESSES[options.process], *countdown(options.seed)))
    rng = torch.Generator().manual_seed(100 + options.seed)
    data = denoiser.sample(64, LENGTH, rng)
    began = time.perf_counter()
    schedule = JYS(sampling_steps=max(options.steps), points=256).search(denoiser, data)
    cost, spent = denoiser.rows, time.perf_counter() - began
    truth = pairs(denoiser.sample(20_000, LENGTH, rng)).sum(0)
    noise = denoiser.process.prior(torch.rand(DRAWN, LENGTH, generator=rng, dtype=torch.float64))

    def distance(times: Tensor) -> float:
        x = euler(denoiser, noise, times, generator=torch.Generator().manual_seed(200 + options.seed))
        shares = pairs(x).sum(0)
        return float((shares / shares.sum() - truth / truth.sum()).abs().sum() / 2)

    print(f"the search: {cost:,} sequences through the network, {spent:.1f} s")
    print(f"{'steps':>6}{'distance':>10}{'equal steps':>13}{'their distance':>16}{'pays after':>12}")
    for steps in options.steps:
        began = time.perf_counter()
        reached = distance(schedule.times(steps))
        seen: dict[int, float] = {}

        def good(n: int, aim: float = reached, seen: dict[int, float] = seen) -> bool:
            seen[n] = seen[n] if n in seen else distance(equal(n))
            return seen[n] <= aim

        found = least(good, steps, options.most)
        told = f"{found}" if found else f"> {options.most}"
        theirs = seen[found] if found else min(seen.values())
        saved = (found or options.most) - steps
        pays = f"{-(-cost // saved):,}" if saved else "never"
        print(f"{steps:>6}{reached:>10.4f}{told:>13}{theirs:>16.4f}{pays:>12}", flush=True)


if __name__ == "__main__":
    main()
