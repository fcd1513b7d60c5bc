"""What distillation costs: an update against one of plain training, and a student's pictures against its teacher's.

    python benchmarks/distill.py                           # the embedded pipeline
    python benchmarks/distill.py --model DIR --batch 4     # any text-to-image pipeline

All in one process, the fastest of ``--repeats`` counts. Plain training is the v-loss of the same network on the same
latents and prompts, with the same optimiser; an update of a method is a whole one of its loop, averaged weights and
clipping included, and where it has several loops each counts alone. The forward passes are what an update needs at
least, a backward pass counted as two. Weights do not matter for the time: what is drawn with is an untrained student.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sfumato import catalog
from sfumato.distill import MultistepCM
from sfumato.pipeline import Text2Image, few_steps, load_text2image
from timing import of_updates, timed

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "multistep-cm": {
        "ct": {"mode": "ct", "cfg_scale": 1.0}, "cd": {"mode": "cd", "cfg_scale": 1.0},
        "cd, guided": {"mode": "cd", "cfg_scale": 3.0},
    },
    "instaflow": {"": {"reflow_updates": 10, "perceptual_updates": 0}},
}  # fmt: skip
"""Ways in which a method is timed, and their settings."""
PASSES = {"plain training": 3, "multistep-cm ct": 4, "multistep-cm cd": 5, "multistep-cm cd, guided": 6}


def plain_step(teacher: Text2Image, batch: int, folder: Path) -> Callable[[], object]:
    """One update of plain training on the data that multistep-cm learns from."""
    data = MultistepCM(mode="ct", pictures=4 * batch, batch=batch).recipe(teacher, teacher, folder).data
    student, numbers = teacher.copy(own="full"), iter(range(10**9))
    optimizer = torch.optim.AdamW(student.network.parameters(), lr=1e-6)

    def work() -> None:
        rng, denoiser = torch.Generator().manual_seed(next(numbers)), student.denoiser
        drawn = data.batch(rng, batch)
        x, cond = drawn["x"].to(student.device), data.conditioning(drawn["rows"], drawn["bare"])
        t, eps = torch.rand(batch, generator=rng), torch.randn(x.shape, generator=rng).to(x)
        z = denoiser.process.diffuse(x, t, eps)
        target = denoiser.process.convert(eps, z, t, "eps", "v")
        optimizer.zero_grad()
        (denoiser.predict(z, t, cond, "v") - target).square().mean().backward()
        optimizer.step()

    return work


def updates(teacher: Text2Image, batch: int, repeats: int, folder: Path) -> dict[str, float]:
    """Seconds of an update of plain training and of every method's loops."""
    found = timed({"plain training": plain_step(teacher, batch, folder / "plain")}, repeats)
    same = {"batch": batch, "updates": repeats + 1, "accumulate": 1, "checkpoint_every": 1000, "grid_every": 0}
    for entry in catalog.methods("distill"):
        method = entry.load()
        for kind, told in KINDS.get(entry.name, {"": {}}).items():
            few = {k: 4 * batch for k in ("pictures", "pairs") if hasattr(method, k)}
            made = method(teacher=teacher, **{**method.EXAMPLE, **same, **few, **told})
            name = f"{entry.name} {kind}".strip()
            loops = of_updates(partial(made.run, folder / name, progress=False))
            found |= {f"{name}: {title}" if title != entry.name else name: seconds for title, seconds in loops.items()}
    return found


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
        seconds = updates(teacher, args.batch, args.repeats, Path(folder))
    print(f"\n{'an update':44}{'seconds':>10}{'ratio':>8}{'of forward passes':>20}")
    for name, value in seconds.items():
        least = f"{PASSES[name] / 3:20.2f}" if name in PASSES else ""
        print(f"{name:44}{value:10.3f}{value / seconds['plain training']:8.2f}{least}")

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
