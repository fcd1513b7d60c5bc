"""What steering costs: a step under every patch against a plain one, and local bases against a loop over vectors.

    python benchmarks/steering.py                            # the embedded pipeline
    python benchmarks/steering.py --part basis --shapes sd1  # Stable Diffusion 1.x's U-Net, random weights: minutes

Steps: the same prompts and seeds, with guidance, plainly and under each patch in turns, the fastest round of each; what
upsample guidance adds is told against plain sampling of the larger size. Bases: one iteration for rank 8, that is eight
products with the Jacobian of the bottleneck's features forward and eight backward; ours in chunks of rows, the loop as
published code does it, a vector at a time (forward) and a row of the Jacobian at a time (backward). Each in a process
of its own, which tells its peak memory; both must come to the same products.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfumato import catalog
from sfumato.edit.parts.geometry import pulled, pushed
from sfumato.pipeline import load_text2image
from timing import timed

RANK = 8
Features = Callable[[Tensor], Tensor]


def steps(model: str, n: int, count: int, repeats: int) -> None:
    """Every patch of the catalogue beside the plain pipeline."""
    pipe = load_text2image(model)
    prompts, seeds = ["a red star and a blue fish"] * n, list(range(n))
    draw = lambda **told: pipe.draw(prompts, seeds, sampling_steps=count, scheduler="ddim", **told)
    large = 2 * pipe.size

    def under(cls: Any, **told: Any) -> Callable[[], object]:
        def work() -> None:
            with cls(**cls.EXAMPLE).patch(pipe):
                draw(**told)

        return work

    works: dict[str, Callable[[], object]] = {"plain": draw, f"plain, {large} pixels": lambda: draw(size=large)}
    for entry in catalog.methods("steer"):
        more = {"size": large} if entry.name == "upsample-guidance" else {}
        works[entry.name] = under(entry.load(), **more)
    print(f"{n} pictures, {count} steps\n\n| | ms a step | of plain |\n| --- | ---: | ---: |")
    found = timed(works, repeats)
    for name, seconds in found.items():
        plain = found[f"plain, {large} pixels"] if name == "upsample-guidance" else found["plain"]
        print(f"| {name} | {1000 * seconds / count:.1f} | {seconds / plain:.2f} |")


def embedded(model: str) -> tuple[Features, Tensor]:
    """The features of a pipeline's bottleneck, and a latent."""
    pipe = load_text2image(model)
    cond = pipe.encode("a red star")
    x = torch.randn(pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
    return lambda rows: pipe.features(rows, 0.7, cond), x


def sd1() -> tuple[Features, Tensor]:
    """The same of a U-Net of the published size, 860 million random weights; stopped behind its middle block."""
    from diffusers import UNet2DConditionModel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)  # each way runs in a process of its own, and both must meet the same network
    net = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    net.requires_grad_(False).eval()
    rng = torch.Generator().manual_seed(0)
    tokens, x = torch.randn(1, 77, 768, generator=rng), torch.randn(4, 64, 64, generator=rng)
    found: list[Tensor] = []

    class Reached(Exception):
        pass

    def stop(module: Any, args: Any, out: Tensor) -> None:
        found.append(out)
        raise Reached

    net.mid_block.register_forward_hook(stop)

    def features(rows: Tensor) -> Tensor:
        found.clear()
        try:
            with sdpa_kernel(SDPBackend.MATH):
                net(rows, 700, tokens.expand(len(rows), -1, -1))
        except Reached:
            pass
        return found[0]

    return features, x


def one_by_one(f: Features, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """J v and J^T J v a vector at a time, and a row of the second at a time."""
    forward = torch.cat([
        torch.func.jvp(lambda a, row=row: f((x + a * row)[None]), (torch.zeros(()),), (torch.ones(()),))[1].detach()
        for row in v
    ])  # fmt: skip
    products = lambda z: (f(z[None]) * forward).flatten(1).sum(1)
    return forward, torch.autograd.functional.jacobian(products, x)


def basis(way: str, model: str, shapes: str, chunk: int) -> None:
    """One iteration in this process; what it took, as JSON."""
    f, x = sd1() if shapes == "sd1" else embedded(model)
    random = torch.randn(x.numel(), RANK, generator=torch.Generator().manual_seed(1))
    v = torch.linalg.qr(random)[0].T.reshape(RANK, *x.shape)
    start = time.perf_counter()
    if way == "ours":
        u = pushed(f, x, v, chunk)
        w = pulled(f, x, u)
    else:
        u, w = one_by_one(f, x, v)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "norms": w.flatten(1).norm(dim=1).tolist()}))


def bases(args: argparse.Namespace) -> None:
    """Both ways, each in a process of its own."""
    told = ["--model", args.model, "--shapes", args.shapes, "--chunk", str(args.chunk)]
    found = {}
    for way in ("ours", "loop"):
        command = [sys.executable, __file__, "--way", way, *told]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = json.loads(ran.stdout.splitlines()[-1])
    same = torch.allclose(*(torch.tensor(found[way]["norms"]) for way in found), rtol=1e-3)
    shapes = "Stable Diffusion 1.x" if args.shapes == "sd1" else args.model
    print(f"\nrank {RANK}, one iteration, {shapes}, the same products: {'yes' if same else 'NO'}\n")
    print("| | seconds | of ours | peak memory, MB |\n| --- | ---: | ---: | ---: |")
    for way, figures in found.items():
        ratio = figures["seconds"] / found["ours"]["seconds"]
        print(f"| {way} | {figures['seconds']:.2f} | {ratio:.2f} | {figures['peak'] / 1e6:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch")
    parser.add_argument("--part", choices=("steps", "basis", "all"), default="all")
    parser.add_argument("--shapes", choices=("model", "sd1"), default="model", help="of the network for bases")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=RANK, help="rows in one pass of ours")
    parser.add_argument("--way", choices=("ours", "loop"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        basis(args.way, args.model, args.shapes, args.chunk)
        return
    if args.part != "basis":
        steps(args.model, args.pictures, args.steps, args.repeats)
    if args.part != "steps":
        bases(args)


if __name__ == "__main__":
    main()
