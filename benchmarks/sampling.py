"""What the adapter costs: `Text2Image.sample` against calling its diffusers pipeline directly.

    python benchmarks/sampling.py                          # the embedded pipeline, 16 pictures, 25 steps

Both draw the same pictures (prompts, seeds, scheduler, guidance, one batch) in one process, in turns, and the fastest
turn of each counts. The aim is an overhead of at most 3 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.pipeline import load_text2image


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch")
    parser.add_argument("--prompt", default="a red star on a white background, flat style")
    parser.add_argument("--pictures", type=int, default=16, help="in one batch")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    p = load_text2image(options.model)
    p.pipe.set_progress_bar_config(disable=True)
    n, scale = options.pictures, p.defaults["cfg_scale"]

    def direct() -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
        settings = {"num_inference_steps": options.steps, "guidance_scale": scale, "output_type": "pt"}
        return p.pipe([options.prompt] * n, generator=generators, height=p.size, width=p.size, **settings).images.cpu()

    def ours() -> Tensor:
        return p.sample(options.prompt, range(n), steps=options.steps, batch_size=n)

    timed(direct), timed(ours)  # the first run of anything is slow
    rows = [(timed(direct), timed(ours)) for _ in range(options.repeats)]
    plain, adapted = (min(row[side][0] for row in rows) for side in (0, 1))
    gap = max(float((row[0][1] - row[1][1]).abs().max()) for row in rows)
    print(f"{torch.get_num_threads()} threads, {p.device}; {n} pictures of {p.size} px, {options.steps} steps")
    print(f"diffusers pipeline  {n / plain:8.2f} pictures/s")
    print(f"Text2Image.sample   {n / adapted:8.2f} pictures/s")
    print(f"overhead            {adapted / plain - 1:8.1%} (aim: at most 3 %); largest difference of a pixel {gap:.1e}")


if __name__ == "__main__":
    main()
