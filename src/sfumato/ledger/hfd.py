"""HFD: drawn details against the blurred decoder at equal bits, less noise against the cosine, flow against diffusion.

Every arm trains the same codec, from the same seed, so the bits are the same.
"""

from __future__ import annotations

from typing import Any

import torch

from sfumato.metrics.perceptual import MSE
from sfumato.train.hfd import HFD

from .core import Claim, Experiment, Figures, Found
from .pixels import distances, fresh, texture, trained

SIZE = 32
CODEC_UPDATES, UPDATES = 1200, 300
STEPS, FEW = 25, 5
DRAWN = 96
ARMS: dict[str, dict[str, Any]] = {
    "less noise": {"shift": 2.0},
    "cosine": {"shift": 0.0},
    "flow": {"decoder": "flow"},
}


def recipe(seed: int, codec_updates: int, updates: int, **arm: Any) -> HFD:
    """One codec and one U-Net for all arms."""
    return HFD(
        size=SIZE, pictures=3000, seed=seed, lam=0.0035, hyper=False, codec_width=32, codec_latent=48, codec_blocks=1,
        codec_attention=False, codec_updates=codec_updates, codec_batch=16, codec_lr=1e-3, codec_ema=0.99,
        updates=updates, batch=16, lr=2e-3, warmup=50, ema=0.99, checkpoint_every=max(updates, codec_updates),
        channels=(24, 48), blocks=(1, 1), embedding=64, sampling_steps=STEPS, **arm,
    )  # fmt: skip


def measure(
    seed: int, arm: str, codec_updates: int = CODEC_UPDATES, updates: int = UPDATES, n: int = DRAWN
) -> Figures:
    """Train one decoder on the codec, and compare what both make of fresh pictures with these."""
    model: Any = trained(recipe(seed, codec_updates, updates, **ARMS[arm]))
    truth, part = fresh(SIZE, seed, n), max(2, n // 3)
    blurred = model.reconstruct(truth)
    seeds = range(1000 * seed, 1000 * seed + n)
    cond = model.told(truth / 2 + 0.5)
    drawn = {steps: 2 * model.draw(None, seeds, sampling_steps=steps, cond=cond) - 1 for steps in (STEPS, FEW)}
    texture_of = lambda x: distances(texture(x), texture(truth), part)
    psnr = lambda x: float(-10 * MSE()(x / 2 + 0.5, truth / 2 + 0.5).log10().mean())  # of what is not cut to [0, 1]
    pixels = ((truth / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return {
        "blurred": texture_of(blurred),
        **{f"{steps} steps": texture_of(x) for steps, x in drawn.items()},
        "error": (drawn[STEPS] - truth).square().flatten(1).mean(1).tolist(),
        "least error": (blurred - truth).square().flatten(1).mean(1).tolist(),
        "figures": {
            "bits per pixel": sum(map(model.bits, pixels)) / (n * SIZE**2),
            "PSNR, blurred": psnr(blurred),
            f"PSNR, {STEPS} steps": psnr(drawn[STEPS]),
            f"PSNR, {FEW} steps": psnr(drawn[FEW]),
        },
    }  # fmt: skip


def compare(arms: dict[str, Figures]) -> Found:
    """Drawn against blurred, schedule against schedule, flow against diffusion, error against twice the least."""
    ours = arms["less noise"]
    return {
        "realism": (ours[f"{STEPS} steps"], ours["blurred"]),
        "schedule": (ours[f"{STEPS} steps"], arms["cosine"][f"{STEPS} steps"]),
        "flow": (arms["flow"][f"{FEW} steps"], ours[f"{FEW} steps"]),
        "faithfulness": (ours["error"], [2 * error for error in ours["least error"]]),
        "rates and distortions": {arm: figures["figures"] for arm, figures in arms.items()},
    }


_TEXTURE = "Fréchet distance to the pictures themselves of the log-energies of Haar details, for each third of them."
EXPERIMENT = Experiment(
    name="hfd",
    paper="arXiv 2305.18231",
    claims={
        "realism": Claim(
            "At equal bits what the diffusion decoder draws has more of the pictures' texture than what the decoder "
            "trained for the squared error gives.",
            "diffusion decoder",
            "the codec's own pictures",
            _TEXTURE,
            "lower",
        ),
        "schedule": Claim(
            "A log-SNR that is higher by 2 at all times draws better texture than the plain cosine, in as many steps.",
            "cosine schedule with a shift of 2",
            "cosine schedule",
            _TEXTURE,
            "lower",
        ),
        "flow": Claim(
            f"In {FEW} steps the rectified flow draws better texture than diffusion.",
            "rectified flow",
            "diffusion",
            _TEXTURE,
            "lower",
        ),
        "faithfulness": Claim(
            "Realism costs less than 3.01 dB: the squared error of what is drawn is less than twice that of the codec.",
            "squared error of what is drawn",
            "twice the squared error of the codec's pictures",
            "Squared error of a picture in [-1, 1], for each.",
            "lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned on any seed; settings as first written.",
    measure=measure,
    arms=tuple(ARMS),
    compare=compare,
    cost=110,
    notes=f"Pictures of {SIZE} pixels; {CODEC_UPDATES} updates of a codec with a factorised prior, {UPDATES} of a "
    "U-Net; the paper's decoders are larger by three orders of magnitude. Bits are those of the coder's tables.",
)
