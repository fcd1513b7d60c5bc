"""A training step of the loop against others' with the same network, and what it costs as pictures and batches grow.

    python benchmarks/training.py                          # 32 pixels, batches of 32
    python benchmarks/training.py --no-growth --repeats 10

Each pair in one process, in turns, the fastest of ``--repeats`` steps of each counts.
A step is everything that training does for it: batch, noise, forward, backward, clipping, AdamW, averaged weights.

- against a plain script on diffusers (``DDPMScheduler.add_noise``, mean squared error, ``EMAModel``), on its
  ``UNet2DModel``;
- against denoising-diffusion-pytorch (its ``GaussianDiffusion`` and ``ema_pytorch``, every 10 updates, as its trainer
  does), on its ``Unet``; where it is not installed, this is left out and said.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.noise import GaussianProcess
from sfumato.noise.schedule import Cosine
from sfumato.train import draw
from sfumato.train.loop import Recipe, Run, Schedule
from sfumato.train.pixels import PixelTraining
from sfumato.train.simple_diffusion import SimpleDiffusion
from timing import timed

LR, CLIP = 1e-4, 1.0


class Plain(Recipe):
    """The least recipe of the loop: eps-prediction on pictures in memory, with whatever network."""

    name = "plain"

    def __init__(self, network: nn.Module, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor):
        self.network, self.predict, self.x = network, predict, x
        self.process = GaussianProcess(Cosine())

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def batch(self, step: int, rng: torch.Generator, size: int) -> Tensor:
        return self.x[draw.integers(len(self.x), size, rng)]

    def loss(self, batch: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.to(next(self.network.parameters()).device)
        t, eps = draw.uniform(len(x), rng).to(x), draw.normal(x.shape, rng).to(x)
        z = self.process.diffuse(x, t, eps)
        return (self.predict(z, 1000 * t) - eps).square().mean(), {}


def our_step(recipe: Any, batch: int, folder: Path) -> Callable[[], Any]:
    """One update of the loop."""
    schedule = Schedule(updates=10**6, batch=batch, lr=LR, clip_norm=CLIP, precision="no", track="none")
    return Run(recipe, schedule, folder).one_step


def diffusers_step(network: nn.Module, x: Tensor, batch: int) -> Callable[[], Any]:
    """One update as the training scripts of diffusers do it."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    device = next(network.parameters()).device
    scheduler, ema = DDPMScheduler(), EMAModel(network.parameters(), 0.9999)
    optimizer = torch.optim.AdamW(network.parameters(), LR)

    def step() -> None:
        clean = x[torch.randint(len(x), (batch,))].to(device)
        noise, t = torch.randn_like(clean), torch.randint(1000, (batch,), device=device)
        guess = network(scheduler.add_noise(clean, noise, t), t).sample
        nn.functional.mse_loss(guess, noise).backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())

    return step


def ddp_step(network: nn.Module, x: Tensor, batch: int) -> Callable[[], Any]:
    """One update as the trainer of denoising-diffusion-pytorch does it; it takes pictures in [0, 1]."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    device = next(network.parameters()).device
    diffusion = GaussianDiffusion(network, image_size=x.shape[-1], objective="pred_noise").to(device)
    optimizer = torch.optim.AdamW(diffusion.parameters(), LR)
    ema = EMA(diffusion, beta=0.995, update_every=10)

    def step() -> None:
        diffusion(x[torch.randint(len(x), (batch,))].to(device) / 2 + 0.5).backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


def pairs(size: int, batch: int, repeats: int, folder: Path, device: str) -> None:
    """The table of both comparisons."""
    from diffusers import UNet2DModel

    x = torch.rand(4 * batch, 3, size, size) * 2 - 1
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = lambda: UNet2DModel(size, layers_per_block=1, block_out_channels=(64, 128), **blocks).to(device)
    sample = lambda net: lambda z, t: net(z, t).sample
    compared = [("diffusers, UNet2DModel", diffusers_step(unet(), x, batch), unet(), sample)]
    try:
        from denoising_diffusion_pytorch import Unet

        made = lambda: Unet(dim=64, dim_mults=(1, 2), full_attn=(False, True)).to(device)
        compared.append(("denoising-diffusion-pytorch, Unet", ddp_step(made(), x, batch), made(), lambda n: n))
    except ImportError as error:
        print(f"denoising-diffusion-pytorch is not timed: {error}\n")
    print(f"{'pictures/s of training':38}{'theirs':>9}{'ours':>9}{'ours to theirs':>16}")
    for name, step, network, call in compared:
        ours = our_step(Plain(network, call(network), x), batch, folder / name)
        found = timed({"theirs": step, "ours": ours}, repeats)
        rates = {side: batch / seconds for side, seconds in found.items()}
        print(f"{name:38}{rates['theirs']:9.1f}{rates['ours']:9.1f}{rates['ours'] / rates['theirs']:16.3f}")


def growth(repeats: int, folder: Path) -> None:
    """How a step of a whole recipe, ``simple-diffusion``, grows with the pictures' side and the batch."""
    sides, batches = (16, 32, 64, 128), (1, 4, 16)
    print("\nmilliseconds a picture of a training step, sfumato train simple-diffusion --backbone unet")
    print(f"{'side':8}" + "".join(f"{f'batch {b}':>12}" for b in batches))
    for side in sides:
        row = []
        for batch in batches:
            recipe = SimpleDiffusion(
                data="sketch", pictures=64, size=side, backbone="unet", channels=(32, 64), blocks=(1, 2),
                attention=(), embedding=128, batch=batch, precision="no", track="none",
            )  # fmt: skip
            pictures = recipe.open()
            model = recipe.model(recipe.labels_of(pictures))
            run = Run(PixelTraining(recipe, model, pictures), recipe, folder / f"{side}-{batch}")
            row.append(timed({"": run.one_step}, repeats)[""] / batch)
        print(f"{side:<8}" + "".join(f"{1e3 * value:12.2f}" for value in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-growth", dest="growth", action="store_false")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, float32; {args.batch} pictures of {args.size} px a step\n")
    with tempfile.TemporaryDirectory() as folder:
        pairs(args.size, args.batch, args.repeats, Path(folder), device)
        if args.growth:
            growth(args.repeats, Path(folder))


if __name__ == "__main__":
    main()
