"""How fast an audit goes with batching, against one picture at a time.

    python benchmarks/audit.py                             # the embedded pipeline, "star" erased by UCE, no attack

Both audits draw and judge the same pictures in one process. An attack is left out: it is one training run either way.
"""

from __future__ import annotations

import argparse
import time

import torch

from sfumato.audit import audit
from sfumato.erase import UCE
from sfumato.pipeline import load_text2image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16, help="pictures of the erased concept")
    parser.add_argument("--n-retain", type=int, default=2, help="pictures of each retained concept, at least")
    parser.add_argument("--sampling-steps", "--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()

    before = load_text2image("sketch")
    after = UCE(concepts=("star",)).apply(before)
    settings = {
        "n": options.n, "n_retain": options.n_retain, "sampling_steps": options.sampling_steps, "attacks": (),
        "progress": False,
    }  # fmt: skip
    before.draw("a star", range(2), sampling_steps=2)  # the first run of anything is slow
    seconds, reports = {}, {}
    for size in (options.batch, 1):
        start = time.perf_counter()
        reports[size] = audit(before, after, ["star"], batch=size, **settings)
        seconds[size] = time.perf_counter() - start
    pictures = 2 * len(reports[1].protocol["seeds"])
    print(f"{torch.get_num_threads()} threads, {before.device}; {pictures} pictures of {before.size} px at "
          f"{options.sampling_steps} steps, drawn and judged")  # fmt: skip
    for size in seconds:
        print(f"batches of {size:>3}   {pictures / seconds[size]:8.2f} pictures/s   "
              f"star erased {reports[size].erasure['star'].value:.1%}")  # fmt: skip
    print(f"ratio            {seconds[1] / seconds[options.batch]:8.2f}")


if __name__ == "__main__":
    main()
