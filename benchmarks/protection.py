"""A step of protection with and without the network's Jacobian, and Shapley values of 3 to 8 parts, in one run.

    python benchmarks/protection.py                          # the embedded pipeline
    python benchmarks/protection.py --model FOLDER --device cuda --size 512

A step is timed as the mean over ``--updates`` of them, on one picture of noise; sources take turns and the fastest
round counts. Shapley values are of a table of all alliances (measured already), with 1,000 columns, one a seed.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from sfumato.attribute.parts.game import leave_one_out, shapley
from sfumato.pipeline import load_text2image
from sfumato.pipeline.timing import peak_memory
from sfumato.protect import DiffProtect
from sfumato.protect.parts.sources import THROUGH_NETWORK
from timing import timed

SOURCES = ("sds-", "advdm+", "encoder", "mist", "sdst-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    pipe = load_text2image(args.model, args.device)
    side = args.size or pipe.size
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    works = {s: lambda s=s: DiffProtect(source=s, updates=args.updates, prompt="").run(pipe, picture) for s in SOURCES}
    print("| source | network's Jacobian | ms a step |\n| --- | --- | ---: |")
    for source, seconds in timed(works, args.repeats).items():
        print(f"| {source} | {'yes' if source in THROUGH_NETWORK else 'no'} | {1000 * seconds / args.updates:.1f} |")
    print(f"\npeak memory {peak_memory(pipe) or 0:,} bytes\n")
    print("| parts | alliances | Shapley, ms | leaving one out, ms |\n| ---: | ---: | ---: | ---: |")
    for n in range(3, 9):
        worth = torch.randn(1 << n, 1000, dtype=torch.float64)
        taken = timed({"all": partial(shapley, worth), "one": partial(leave_one_out, worth)}, args.repeats)
        print(f"| {n} | {1 << n} | {1000 * taken['all']:.2f} | {1000 * taken['one']:.2f} |")


if __name__ == "__main__":
    main()
