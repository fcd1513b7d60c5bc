"""The Fréchet distance of two sets of features: ours against scipy's matrix square root, in one run.

    python benchmarks/frechet.py                            # two sets of 10,000 x 2,048
    python benchmarks/frechet.py --eigenvalues              # also the eigenvalues of the product, as other libraries do
    python benchmarks/frechet.py --pictures 1000            # fewer pictures than features

The features are random with a spectrum that falls as 1 / rank, rotated, float32, and the two sets differ in it. The
first lines are for the trace term alone, from covariances that are there; the others include means and covariances.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from sfumato.metrics.frechet import Gaussian, frechet_distance, trace_of_root

clock = time.perf_counter


def timed(work: Callable[[], float]) -> tuple[float, float]:
    start = clock()
    value = float(work())
    return clock() - start, value


def draw(n: int, d: int, seed: int, power: float) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d + 1, dtype=torch.float32) ** -power
    turn = torch.randn(d, d, generator=rng) / d**0.5
    return (torch.randn(n, d, generator=rng) * spectrum) @ (turn + torch.eye(d)) + 0.01 * seed


def numpy_moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    array = x.numpy().astype(np.float64)
    return array.mean(0), np.cov(array, rowvar=False)


def row(name: str, seconds: float, value: float, reference: tuple[float, float]) -> None:
    ratio, gap = seconds / reference[0], abs(value - reference[1]) / abs(reference[1])
    print(f"{name:34} {seconds:9.2f} s {ratio:8.1f} x ours {value:18.10g} {gap:10.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000, help="in each set")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="runs of our side, the fastest of which counts")
    parser.add_argument("--eigenvalues", action="store_true", help="also time eigvals(S_x S_y)")
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of wall time: for a machine in use")
    options = parser.parse_args()
    global clock
    clock = time.process_time if options.cpu else time.perf_counter
    x, y = (draw(options.pictures, options.features, seed, 0.5 * seed) for seed in (1, 2))
    print(f"{options.pictures} x {options.features} features in each set, {torch.get_num_threads()} threads")
    print(f"{'':34} {'CPU time' if options.cpu else 'time':>11} {'':>15} {'value':>18} {'difference':>10}")

    known = [Gaussian(s).moments for s in (x, y)]
    ours = min(timed(lambda: trace_of_root(*(Gaussian(s, m) for s, m in zip((x, y), known, strict=True))))
               for _ in range(options.repeats))  # fmt: skip
    row("trace: ours", *ours, ours)
    start = clock()
    (mx, sx), (my, sy) = numpy_moments(x), numpy_moments(y)
    moments = clock() - start
    root = timed(lambda: np.trace(linalg.sqrtm(sx @ sy)).real)
    row("trace: scipy.linalg.sqrtm", *root, ours)
    if options.eigenvalues:
        product = timed(lambda: np.sqrt(np.linalg.eigvals(sx @ sy).astype(complex)).real.sum())
        row("trace: eigenvalues of the product", *product, ours)

    whole = min(timed(lambda: frechet_distance(x, y)) for _ in range(options.repeats))
    row("FD of features: ours", *whole, whole)
    value = float((mx - my) @ (mx - my) + np.trace(sx) + np.trace(sy) - 2 * root[1])
    row("FD of features: numpy and sqrtm", moments + root[0], value, whole)


if __name__ == "__main__":
    main()
