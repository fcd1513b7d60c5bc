"""SFD: a class of digits is forgotten in one step, and the others are drawn better than the teacher would in one."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.erase.parts.score_identity import generated, time_of
from sfumato.erase.sfd import SFD
from sfumato.pipeline import ImageModel
from sfumato.train.sid2 import SiD2

from .core import Claim, Experiment, Found
from .pixels import trained

TEACHER_UPDATES, UPDATES, N = 800, 300, 64


def teacher(seed: int, updates: int = TEACHER_UPDATES) -> ImageModel:
    """A diffusion model of 8x8 digits by class."""
    return trained(SiD2(
        data="digits", size=8, channels=(32, 64), kinds=("res", "transformer"), blocks=(1,), middle=2, head_dim=32,
        embedding=64, dropout=0.0, noise="cosine", batch=64, lr=2e-3, warmup=50, ema=0.99, updates=updates,
        checkpoint_every=updates, grid_every=0, cfg_scale=1.0, seed=seed,
    ))  # fmt: skip


@cache
def reader() -> nn.Module:
    """A small classifier of the digits, and by it the truth about samples: right on 97 % of those it was not shown."""
    pictures = open_pictures("digits", 8)
    x = to_tensor([pictures.picture(i) for i in range(len(pictures))])[:, :1].flatten(1)
    y = torch.tensor([pictures.label(i) for i in range(len(pictures))])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 10))
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
        for _ in range(600):
            rows = torch.randint(len(x), (128,))
            noisy = x[rows] + 0.2 * torch.randn(128, 64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(noisy), y[rows]).backward()
            optimizer.step()
    return net.requires_grad_(False)


def read(pictures: Float[Tensor, "n 3 8 8"]) -> Int[Tensor, "n"]:
    """The digit in each picture in [0, 1]."""
    return reader()((2 * pictures - 1).mean(dim=1).flatten(1)).argmax(dim=1)


def right(model: ImageModel, label: int, seed: int) -> list[float]:
    """For each picture of a class whether it shows it; drawn in one step, the teacher's from the generator's noise."""
    seeds = [100_000 * seed + 1000 * label + i for i in range(N)]
    if model.defaults["distilled_steps"]:
        pictures = model.draw([label] * N, seeds)
    else:
        noise = torch.stack([torch.randn(model.shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        start = time_of(model.process, SFD(concepts="0").sigma_init)
        with torch.no_grad():
            x = generated(model.denoiser, noise, start, model.told([label] * N))
        pictures = ((x + 1) / 2).clamp(0, 1)
    return (read(pictures) == label).double().tolist()


def measure(seed: int, teacher_updates: int = TEACHER_UPDATES, updates: int = UPDATES) -> Found:
    """Train a teacher; distil it with and without forgetting one class; read off what each draws."""
    given, lost = teacher(seed, teacher_updates), int(np.random.default_rng(seed).integers(10))
    settings = {
        "alpha": 1.2, "forget_weight": 0.1, "fake_forget_weight": 0.1, "lr": 2e-4, "fake_lr": 5e-4, "batch": 32,
        "updates": updates, "ema": 0.98, "seed": seed,
    }  # fmt: skip
    plain = {**settings, "forget_weight": 0.0, "fake_forget_weight": 0.0, "distill_updates": updates - 1}
    concept = given.labels[lost]
    models = {
        "sfd": SFD(concepts=(concept,), **settings).apply(given),
        "plain": SFD(concepts=(concept,), **plain).apply(given),
        "teacher": given,
    }
    others = [label for label in range(len(given.labels)) if label != lost]
    shown = {name: right(model, lost, seed) for name, model in models.items()}
    kept = {name: [x for label in others for x in right(model, label, seed)] for name, model in models.items()}
    table = {name: {"forgotten": float(np.mean(shown[name])), "others": float(np.mean(kept[name]))} for name in models}
    return {
        "forgets": (shown["sfd"], shown["plain"]),
        "keeps": (kept["sfd"], kept["teacher"]),
        "shares": table,
    }


EXPERIMENT = Experiment(
    name="sfd",
    paper="arXiv 2409.11219",
    claims={
        "forgets": Claim(
            "After SFD fewer pictures asked for the forgotten class show it than after distillation alone.",
            "SFD, one step",
            "the same distillation of all classes, one step",
            "Share of pictures asked for the class in which a classifier reads it.",
            "lower",
        ),
        "keeps": Claim(
            "The other classes are drawn more surely than by the teacher in one step.",
            "SFD, one step",
            "teacher, x0 for the same noise",
            "Share of pictures asked for a class in which a classifier reads it.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="learning rates and the weight of forgetting at seed 0; the paper's alpha",
    measure=measure,
    cost=200,
    notes="'forgotten': share of pictures asked for the forgotten class that show it; 'others': of pictures asked for "
    "the other classes, theirs. Digits of 8x8 pixels; the paper's pictures are CIFAR-10's and STL-10's.",
)
