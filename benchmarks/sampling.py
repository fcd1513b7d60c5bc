"""What our sampling costs above the network: against a diffusers pipeline called directly, and a loop by hand.

    python benchmarks/sampling.py                          # the embedded pipeline, 16 pictures, 25 steps

`Text2Image.sample` and its pipeline draw the same pictures (prompts, seeds, scheduler, guidance, one batch);
`ImageModel.sample` and a loop of DDIM by hand likewise, with an untrained network of ``sfumato train sid2``. All in one
process, in turns, and the fastest turn of each counts. The aim is an overhead of at most 3 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.pipeline import load_text2image
from sfumato.train.sid2 import SiD2


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch")
    parser.add_argument("--prompt", default="a red star on a white background, flat style")
    parser.add_argument("--pictures", type=int, default=16, help="in one batch")
    parser.add_argument("--sampling-steps", "--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    print(f"{torch.get_num_threads()} threads; {options.pictures} pictures, {options.sampling_steps} steps")
    pipeline(options)
    pixels(options)


def pipeline(options: argparse.Namespace) -> None:
    """A text-to-image pipeline."""
    p = load_text2image(options.model)
    p.pipe.set_progress_bar_config(disable=True)
    n, scale = options.pictures, p.defaults["cfg_scale"]

    def direct() -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
        settings = {"num_inference_steps": options.sampling_steps, "guidance_scale": scale, "output_type": "pt"}
        return p.pipe([options.prompt] * n, generator=generators, height=p.size, width=p.size, **settings).images.cpu()

    def ours() -> Tensor:
        return p.draw(options.prompt, range(n), sampling_steps=options.sampling_steps, batch=n)

    compare("diffusers pipeline", direct, "Text2Image.sample", ours, options)


def pixels(options: argparse.Namespace) -> None:
    """A pixel model, with the network's prediction v."""
    torch.manual_seed(0)
    model = SiD2(**SiD2.presets["small-cifar10"]).model(())
    model.network.eval()
    n, process = options.pictures, model.process
    t = torch.linspace(1, 0, options.sampling_steps + 1)
    (alpha, sigma), logsnr = process.alpha_sigma(t), process.logsnr(t).clamp(-20, 20)

    @torch.no_grad()
    def by_hand() -> Tensor:
        z = torch.stack([torch.randn(model.shape, generator=torch.Generator().manual_seed(s)) for s in range(n)])
        z = z * sigma[0]
        for i in range(options.sampling_steps):
            v = model.network(z, logsnr[i].expand(n), None)
            x = (alpha[i] * z - sigma[i] * v).clamp(-1, 1)
            z = alpha[i + 1] * x + sigma[i + 1] * (z - alpha[i] * x) / sigma[i]
        return (x + 1) / 2

    def ours() -> Tensor:
        return model.draw(None, range(n), scheduler="ddim", sampling_steps=options.sampling_steps, batch=n)

    compare("a loop by hand", by_hand, "ImageModel.sample", ours, options)


def compare(
    first: str, plain: Callable[[], Tensor], second: str, ours: Callable[[], Tensor], options: argparse.Namespace
) -> None:
    """Print pictures a second of both and the overhead of the second."""
    timed(plain), timed(ours)  # the first run of anything is slow
    rows = [(timed(plain), timed(ours)) for _ in range(options.repeats)]
    best = [min(row[side][0] for row in rows) for side in (0, 1)]
    gap = max(float((row[0][1] - row[1][1]).abs().max()) for row in rows)
    for name, seconds in zip((first, second), best, strict=True):
        print(f"{name:20}{options.pictures / seconds:8.2f} pictures/s")
    print(f"{'overhead':20}{best[1] / best[0] - 1:8.1%} (aim: at most 3 %); largest difference of a pixel {gap:.1e}\n")


if __name__ == "__main__":
    main()
