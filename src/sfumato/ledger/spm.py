"""SPM: adapters for several concepts harm the rest less than fine-tuning, and fit a fine-tune of their model."""

from __future__ import annotations

from typing import Any

import torch

from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.erase import SPM, ESDx
from sfumato.erase.base import Eraser
from sfumato.pipeline import Text2Image
from sfumato.pipeline.membrane import attach

from .core import Claim, Experiment, Figures, Found
from .erasure import concepts_of, sketch, survey


def measure(seed: int, arm: str) -> Figures:
    """Erase two objects with two adapters, which are then put on a fine-tune of the model; or with ESD-x; or not."""
    concepts, pipe = concepts_of(seed, 2), sketch()
    look = lambda it, n_retain: survey({"it": it}, concepts, seed=seed, n=16, n_retain=n_retain)["it"]
    if arm == "original":
        return look(pipe, 6)
    if arm == "ESD-x":
        return look(ESDx(concepts=concepts, seed=seed, **shorter(ESDx, pipe)).apply(pipe), 6)
    spm = SPM(concepts=concepts, seed=seed, **shorter(SPM, pipe))
    membranes, _ = spm.train(pipe)
    tuned = fine_tuned(pipe, seed)
    attached, moved = (attach(p, membranes, spm.transport, spm.composition) for p in (pipe, tuned))
    return {**look(attached, 6), "moved": look(moved, 2)["gone"], "tuned": look(tuned, 2)["gone"]}


def shorter(eraser: type[Eraser], pipe: Text2Image) -> dict[str, Any]:
    """The settings that suit the pipeline, but three quarters of the updates."""
    settings = eraser.settings_for(pipe)
    return {**settings, "updates": settings["updates"] * 3 // 4}


def compare(arms: dict[str, Figures]) -> Found:
    """Adapters against fine-tuning, erased against original, with against without."""
    return {
        "retention": (arms["SPM"]["kept"], arms["ESD-x"]["kept"]),
        "erasure": (arms["SPM"]["gone"], arms["original"]["gone"]),
        "transfer": (arms["SPM"]["moved"], arms["SPM"]["tuned"]),
    }


def fine_tuned(pipe: Text2Image, seed: int, updates: int = 40, batch: int = 16) -> Text2Image:
    """The network trained further on 512 fresh pictures, with the text encoder as it is."""
    student = pipe.copy(own="full")
    pictures = open_pictures("sketch", pipe.size, seed=1000 + seed, count=512)
    with torch.no_grad():
        rows = [range(i, i + 64) for i in range(0, 512, 64)]
        latents = torch.cat([pipe.encode_image(to_tensor([pictures.picture(i) for i in r])) for r in rows])
        cond = pipe.encode([pictures.caption(i) for i in range(512)])
    weights = list(student.parameters("full").values())
    for w in weights:
        w.requires_grad_(True)
    optimizer, rng = torch.optim.Adam(weights, lr=1e-4), torch.Generator().manual_seed(seed)
    process, kind = pipe.denoiser.process, pipe.denoiser.prediction
    for _ in range(updates):
        chosen = torch.randint(512, (batch,), generator=rng)
        x, t = latents[chosen], torch.rand(batch, generator=rng)
        eps = torch.randn(x.shape, generator=rng)
        z = process.diffuse(x, t, eps)
        target = process.convert(eps, z, t, "eps", kind)
        loss = (student.denoiser(z, t, cond[chosen]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for w in weights:
        w.requires_grad_(False)
    return student


EXPERIMENT = Experiment(
    name="spm",
    paper="arXiv 2312.16145",
    claims={
        "retention": Claim(
            "With two concepts erased, SPM keeps the others better than ESD-x.",
            "SPM, facilitated transport",
            "ESD-x",
            "Share of the attributes asked for that an oracle finds, in pictures of other concepts.",
        ),
        "erasure": Claim(
            "Both concepts are gone from the pictures that ask for them.",
            "SPM, facilitated transport",
            "the original model",
            "Share of pictures asked for a concept in which neither oracle finds it.",
        ),
        "transfer": Claim(
            "Adapters trained on one model erase on a fine-tune of it.",
            "the fine-tune with the adapters",
            "the fine-tune without",
            "Share of pictures asked for a concept in which neither oracle finds it.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="the presets 'sketch', by what goes and what stays at seed 0 on 'star': ESD's by `sfumato bench tune` on "
    "an earlier training of the model, SPM's from two points of that script's grid; of both, three quarters of the "
    "updates, so that the entry takes ten minutes",
    measure=measure,
    arms=("SPM", "ESD-x", "original"),
    compare=compare,
    cost={"SPM": 260, "ESD-x": 99, "original": 17},
)
