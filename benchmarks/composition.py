"""A composition audit against as many audits by themselves: the original is drawn, and attacked, once.

    python benchmarks/composition.py                         # the embedded pipeline, "star" erased by UCE, three links

Both find the same figures of every stage.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from sfumato.audit import Audit
from sfumato.audit.chain import Cast, Chain, Chained, Given, Merge
from sfumato.erase import UCE
from sfumato.pipeline import load_text2image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch")
    parser.add_argument("--concept", default="star")
    parser.add_argument("--n", type=int, default=16, help="pictures of the erased concept")
    parser.add_argument("--sampling-steps", "--steps", type=int, default=10)
    options = parser.parse_args()

    before = load_text2image(options.model)
    after = UCE(concepts=(options.concept,)).apply(before)
    same = {"n": options.n, "n_retain": 2, "sampling_steps": options.sampling_steps, "attacks": (), "progress": False}
    whole = Audit(before=before, after=after, concepts=(options.concept,), **same)
    links = (Merge(weight=0.1), Merge(weight=0.3), Cast(dtype="bfloat16"))
    before.draw("a star", range(2), sampling_steps=2)  # the first run of anything is slow

    start = time.perf_counter()
    chained = [stage.report.erasure for stage in Chain(audit=whole, links=links).run().stages]
    together = time.perf_counter() - start

    start = time.perf_counter()
    stage, alone = Chained(after), [whole.run().erasure]
    for link in links:
        stage = link.act(stage, Given(before))
        alone.append(replace(whole, after=stage.pipe).run().erasure)
    apart = time.perf_counter() - start

    print(f"{torch.get_num_threads()} threads, {before.device}; {len(alone)} audits, each of {options.n} pictures")
    print(f"one chain {together:.1f} s, audits by themselves {apart:.1f} s: {apart / together:.2f} times as long; "
          f"the same figures: {'yes' if chained == alone else 'NO'}")  # fmt: skip


if __name__ == "__main__":
    main()
