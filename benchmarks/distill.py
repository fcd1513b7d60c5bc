"""What distillation costs: an update against one of plain training, and a student's pictures against its teacher's.

    python benchmarks/distill.py                           # the embedded pipeline
    python benchmarks/distill.py --model DIR --batch 4     # any text-to-image pipeline

All in one process, the ways in turn, the fastest of ``--repeats`` counts. Plain training is the v-loss of the same
network on the same latents and prompts, with the same optimiser; the forward passes are what an update needs at least,
a backward pass counted as two. Weights do not matter for the time, so the student here is an untrained one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from sfumato.distill import MultistepCM
from sfumato.pipeline import Text2Image, few_steps, load_text2image
from timing import timed


def updates(teacher: Text2Image, batch: int, folder: Path) -> dict[str, Callable[[], object]]:
    """One update each of plain training and of the kinds of multistep-cm, as the loop does them."""
    works: dict[str, Callable[[], object]] = {}

    def add(name: str, student: Text2Image, loss: Callable[[int], torch.Tensor]) -> None:
        optimizer = torch.optim.AdamW(student.network.parameters(), lr=1e-6)
        step = iter(range(10**9))

        def work() -> None:
            optimizer.zero_grad()
            loss(next(step)).backward()
            optimizer.step()

        works[name] = work

    kinds = {"ct": ("ct", 1.0), "cd": ("cd", 1.0), "cd, guided": ("cd", 3.0)}
    for name, (mode, scale) in kinds.items():
        method = MultistepCM(mode=mode, cfg_scale=scale, pictures=4 * batch, batch=batch)
        student = teacher.copy(own="full")
        recipe = method.recipe(teacher, student, folder)

        def distil(i: int, recipe=recipe) -> torch.Tensor:
            rng = torch.Generator().manual_seed(i)
            return recipe.loss(recipe.batch(i, rng, batch), rng)[0]

        if not works:
            plain = teacher.copy(own="full")

            def train(i: int, data=recipe.data, plain=plain) -> torch.Tensor:
                rng, denoiser = torch.Generator().manual_seed(i), plain.denoiser
                drawn = data.batch(rng, batch)
                x, cond = drawn["x"].to(plain.device), data.conditioning(drawn["rows"], drawn["bare"])
                t, eps = torch.rand(batch, generator=rng), torch.randn(x.shape, generator=rng).to(x)
                z = denoiser.process.diffuse(x, t, eps)
                target = denoiser.process.convert(eps, z, t, "eps", "v")
                return (denoiser.predict(z, t, cond, "v") - target).square().mean()

            add("plain training", plain, train)
        add(f"multistep-cm {name}", student, distil)
    return works


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=25)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    teacher = load_text2image(args.model)
    print(f"{args.model} on {teacher.device}, {torch.get_num_threads()} threads, batch {args.batch}")

    with tempfile.TemporaryDirectory() as folder:
        seconds = timed(updates(teacher, args.batch, Path(folder)), args.repeats)
    passes = {"plain training": 3, "multistep-cm ct": 4, "multistep-cm cd": 5, "multistep-cm cd, guided": 6}
    print(f"\n{'an update':26}{'seconds':>10}{'ratio':>8}{'of forward passes':>20}")
    for name, value in seconds.items():
        print(f"{name:26}{value:10.3f}{value / seconds['plain training']:8.2f}{passes[name] / 3:20.2f}")

    draw = lambda pipe, **o: lambda: pipe.draw("a red star", range(args.batch), batch=args.batch, **o)
    guided = draw(teacher, sampling_steps=args.teacher_steps, cfg_scale=3.0)
    works = {f"teacher, {args.teacher_steps} steps, guided": guided}
    for steps in args.steps:
        student = teacher.copy(own="full")
        few_steps(student, steps)
        works[f"student, {steps} steps"] = draw(student)
    seconds = timed(works, args.repeats)
    first = next(iter(seconds.values()))
    print(f"\n{'a picture':26}{'seconds':>10}{'times faster':>14}")
    for name, value in seconds.items():
        print(f"{name:26}{value / args.batch:10.4f}{first / value:14.1f}")


if __name__ == "__main__":
    main()
