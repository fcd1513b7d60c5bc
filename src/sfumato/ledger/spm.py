"""SPM: adapters for several concepts harm the rest less than fine-tuning, and fit a fine-tune of their model."""

from __future__ import annotations

import torch

from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.erase import SPM, ESDx
from sfumato.pipeline import Text2Image
from sfumato.pipeline.membrane import attach

from .core import Claim, Experiment, Pair
from .erasure import concepts_of, sketch, survey


def measure(seed: int) -> dict[str, Pair]:
    """Erase two objects with two adapters and with ESD-x; then put the adapters on a fine-tune of the model."""
    concepts, pipe = concepts_of(seed, 2), sketch()
    spm = SPM(concepts=concepts, seed=seed, **SPM.settings_for(pipe))
    membranes, _ = spm.train(pipe)
    pipes = {
        "original": pipe,
        "spm": attach(pipe, membranes, spm.transport, spm.composition),
        "esd": ESDx(concepts=concepts, seed=seed, **ESDx.settings_for(pipe)).apply(pipe),
    }
    seen = survey(pipes, concepts, seed=seed, n=24)
    tuned = fine_tuned(pipe, seed)
    moved = attach(tuned, membranes, spm.transport, spm.composition)
    other = survey({"tuned": tuned, "moved": moved}, concepts, seed=seed, n=24, n_retain=4)
    return {
        "retention": (seen["spm"]["kept"], seen["esd"]["kept"]),
        "erasure": (seen["spm"]["gone"], seen["original"]["gone"]),
        "transfer": (other["moved"]["gone"], other["tuned"]["gone"]),
    }


def fine_tuned(pipe: Text2Image, seed: int, steps: int = 60, batch: int = 32) -> Text2Image:
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
    for _ in range(steps):
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
            "Share of the attributes asked for that the oracle finds, in pictures of other concepts.",
        ),
        "erasure": Claim(
            "Both concepts are gone from the pictures that ask for them.",
            "SPM, facilitated transport",
            "the original model",
            "Share of pictures asked for a concept in which the oracle does not find it.",
        ),
        "transfer": Claim(
            "Adapters trained on one model erase on a fine-tune of it.",
            "the fine-tune with the adapters",
            "the fine-tune without",
            "Share of pictures asked for a concept in which the oracle does not find it.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="the presets 'sketch', by what goes and what stays at seed 0 on 'star': ESD's by scripts/tune_sketch.py on "
    "an earlier training of the model, SPM's from two points of that script's grid",
    measure=measure,
)
