"""What `draw` costs above diffusers' own call, for every family of pipelines.

    python benchmarks/families.py                          # tiny instances of the tests, 4 pictures, 10 steps
    python benchmarks/families.py --model DIR              # a pipeline of one's own, on its device

Both draw the same pictures (prompts, seeds, scheduler, guidance, one batch) in one process, in turns, and the fastest
turn of each counts. The networks of the tiny instances take next to no time, so that the ratio is an upper bound; what
carries over to a real one is the difference by step. The aim is a ratio of at most 1.03.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import torch

from sfumato.pipeline import Text2Image, load_text2image
from timing import timed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

PROMPTS = ["a red star", "a photo of a blue circle", "art", "a square"]


def own(p: Text2Image, seeds: list[int], steps: int) -> Any:
    """The pictures by diffusers' own call, with the guidance that `draw` has by itself."""
    scale = p.defaults["cfg_scale"]
    guidance = {
        "flux": {"true_cfg_scale": scale}, "qwen": {"true_cfg_scale": scale, "negative_prompt": " "},
        "zimage": {"guidance_scale": scale - 1},
    }.get(p.family, {"guidance_scale": scale})  # fmt: skip
    if "use_resolution_binning" in inspect.signature(type(p.pipe).__call__).parameters:
        guidance["use_resolution_binning"] = False
    size = {"height": p.size, "width": p.size, "num_inference_steps": steps, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return p(list(PROMPTS), generator=generators, **size, **guidance).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; the tiny instances if there is none")
    parser.add_argument("--sampling-steps", "--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.model is None:
        from models import families

        pipes = list(families())
    else:
        pipes = [load_text2image(options.model)]

    steps, seeds = options.sampling_steps, list(range(len(PROMPTS)))
    print(f"{torch.get_num_threads()} threads; {len(PROMPTS)} pictures, {steps} steps")
    for p in pipes:
        p.pipe.set_progress_bar_config(disable=True)
        ours = p.draw(PROMPTS, seeds, sampling_steps=steps)
        away = float((ours - own(p, seeds, steps).cpu().float()).abs().max())
        works = {
            "own": lambda p=p: own(p, seeds, steps), "draw": lambda p=p: p.draw(PROMPTS, seeds, sampling_steps=steps)
        }  # fmt: skip
        took = timed(works, options.repeats)
        more = 1000 * (took["draw"] - took["own"]) / steps
        ratio = took["draw"] / took["own"]
        print(f"{p.title:26} {ratio:5.3f} times; {more:+6.2f} ms a step; pictures differ by at most {away:.0e}")


if __name__ == "__main__":
    main()
