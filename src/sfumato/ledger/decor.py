"""DECOR: less of what else was in a LoRA's pictures, for less of their style than other remedies cost?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data.sketch import COLOURS, OBJECTS, STYLES, render, sample_scene
from sfumato.metrics.detectors import OracleDetector
from sfumato.pipeline import Text2Image
from sfumato.steer import DECOR

from .core import Claim, Experiment, Found
from .erasure import STEPS, sketch

PICTURES, UPDATES, BATCH, RATE, PROMPTS = 3, 600, 6, 5e-3, 24
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAK, OTHERS = ("red", "square"), tuple(o for o in OBJECTS if o != "square")


def overfitted(seed: int, style: str) -> Text2Image:
    """The embedded model with a LoRA of three pictures in one style, a red square in each of them.

    Their captions name the style alone, as those of a style's pictures do, so that it has to hold the square too.
    """
    pipe, rng, draws = sketch().copy(), np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    scenes = [sample_scene(rng, 1, object="square", colour="red", style=style) for _ in range(PICTURES)]
    shown = [render(scene, pipe.size) for scene in scenes]
    x0 = pipe.encode_image(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 127.5 - 1)
    cond = pipe.encode(f"{style} style")
    adapter = pipe.add_adapter("style", rank=8, alpha=8.0, generator=draws)
    for x in adapter.parameters():
        x.requires_grad_(True)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=RATE)
    for _ in range(UPDATES):
        z0 = x0[torch.randint(PICTURES, (BATCH,), generator=draws)]
        eps, t = torch.randn(z0.shape, generator=draws), torch.rand(BATCH, generator=draws).clamp(0.02, 0.98)
        z = pipe.denoiser.process.diffuse(z0, t, eps)
        loss = F.mse_loss(pipe.denoiser.predict(z, t, cond.repeat(BATCH), "eps"), eps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for x in adapter.parameters():
        x.requires_grad_(False)
    return pipe


def read(pictures: Tensor, asked: Sequence[str], style: str) -> dict[str, list[float]]:
    """For each picture 1 where the oracle finds a square; what was asked for; the style."""
    find = OracleDetector()
    present = {word: find(pictures, word).present.float() for word in {"square", style, *asked}}
    leak = present["square"]
    there = [float(present[word][i]) for i, word in enumerate(asked)]
    return {"leak": leak.tolist(), "asked": there, "style": present[style].tolist()}


def measure(seed: int) -> Found:
    """The same prompts and seeds under the LoRA, with DECOR at several strengths, a weaker LoRA, a negative prompt."""
    rng = np.random.default_rng(100 + seed)
    style = str(rng.choice([s for s in STYLES if s != "flat"]))
    pipe = overfitted(seed, style)
    asked = [str(word) for word in rng.choice(OTHERS, PROMPTS)]
    colours = rng.choice([c for c in COLOURS if c != "red"], PROMPTS)
    prompts = [f"a {c} {word}, {style} style" for c, word in zip(colours, asked, strict=True)]
    seeds = [1000 * seed + i for i in range(PROMPTS)]

    def draw(alpha: float = 0.0, scale: float = 1.0, negative: str | None = None) -> dict[str, list[float]]:
        pipe.adapters["style"].scale = scale
        with DECOR(undesired=LEAK, alpha=alpha).patch(pipe) if alpha else nullcontext():
            return read(pipe.draw(prompts, seeds, sampling_steps=STEPS, negative=negative, batch=64), asked, style)

    at = {alpha: draw(alpha) for alpha in ALPHAS}
    weaker = {scale: draw(scale=scale) for scale in (0.25, 0.5, 0.75)}
    negative = draw(negative="a red square")
    table = {f"alpha {a}": found for a, found in at.items()}
    table |= {f"LoRA at {s}": found for s, found in weaker.items()} | {"negative prompt": negative}
    return {
        "leak": (at[1.0]["leak"], at[0.0]["leak"]),
        "alignment": (at[0.5]["asked"], at[0.0]["asked"]),
        "against-scale": (at[0.5]["style"], weaker[0.5]["style"]),
        "against-negative": (at[1.0]["asked"], negative["asked"]),
        "trade-off": {name: {k: float(np.mean(v)) for k, v in found.items()} for name, found in table.items()},
    }


_ASKED = "Share of pictures in which the oracle finds the object asked for."

EXPERIMENT = Experiment(
    name="decor",
    paper="arXiv 2412.09169",
    claims={
        "leak": Claim(
            "Projection takes what else was in the LoRA's pictures out of those drawn with it.",
            "DECOR away from red and square, alpha = 1",
            "the LoRA alone",
            "Share of pictures, asked for other objects in other colours, in which the oracle finds a square.",
            better="lower",
        ),
        "alignment": Claim(
            "Pictures follow their prompts better with it.",
            "DECOR, alpha = 0.5",
            "the LoRA alone",
            _ASKED,
        ),
        "against-scale": Claim(
            "It keeps more of the style than a weaker LoRA does.",
            "DECOR, alpha = 0.5",
            "the LoRA at half its strength",
            "Share of pictures in which the oracle finds the style of the LoRA's pictures.",
        ),
        "against-negative": Claim(
            "Pictures follow their prompts better with it than with a negative prompt.",
            "DECOR away from red and square, alpha = 1",
            'the negative prompt "a red square"',
            _ASKED,
        ),
    },
    seeds=(1, 2, 3),
    tuning="the LoRA's captions, rate and updates by how many squares it draws unasked at seed 0, of four tries (three "
    "of them drew none); alpha is swept and shown, not chosen",
    measure=measure,
    cost=200,
    notes="The paper's adapters are trained on SDXL and judged by CLIP and DINO; here an oracle reads pictures.",
)
