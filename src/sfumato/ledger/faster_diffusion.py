"""Faster Diffusion: nearer to the full run than fewer plain steps, since the encoder's features change slowly?"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from sfumato.data import oracle, sketch
from sfumato.data.cases import balanced
from sfumato.data.world import WORDS
from sfumato.metrics.alignment import oracle_alignment
from sfumato.pipeline import Text2Image
from sfumato.pipeline.split import operations
from sfumato.steer import FasterDiffusion
from sfumato.steer.faster_diffusion import SD_KEYS

from .core import Claim, Experiment, Found
from .erasure import sketch as pipeline

STEPS, PICTURES, TIMED, WATCHED = 50, 24, 4, 4
UNIFORM = tuple(range(0, STEPS, 6))
"""As many key steps as the paper's list has, at equal distances."""


def plain_steps(pipe: Text2Image) -> int:
    """How many plain steps take as many operations as `STEPS` with the paper's key steps, rounded up."""
    z, tokens = torch.zeros(1, *pipe.latent_shape()), pipe.encode("").tokens
    encoder, decoder = operations(pipe.network, z, encoder_hidden_states=tokens)
    return -(-(len(SD_KEYS) * encoder + STEPS * decoder) // (encoder + decoder))


def feature_changes(pipe: Text2Image, prompts: list[str], seeds: list[int]) -> tuple[list[float], list[float]]:
    """Mean relative change |f_i - f_(i-1)| / |f_(i-1)| over the steps of a run, and over the blocks of the encoder or
    of the decoder: a pair of numbers for each picture (features of the conditional prediction)."""
    changes: dict[str, list[Tensor]] = {name: [] for name in pipe.anatomy.blocks()}
    decoder = [name for name in changes if name.startswith("up_blocks")]
    encoder = [name for name in changes if name not in decoder]
    with ExitStack() as stack:
        taps = {name: stack.enter_context(pipe.tap(name)) for name in changes}
        before: dict[str, Tensor] = {}
        for i, _ in enumerate(pipe.states(prompts, seeds, sampling_steps=STEPS)):
            if i == 0:
                continue
            values = {n: tap.value if torch.is_tensor(tap.value) else tap.value[0] for n, tap in taps.items()}
            now = {n: x[: len(seeds)].flatten(1) for n, x in values.items()}
            for name, old in before.items():
                changes[name].append((now[name] - old).norm(dim=1) / old.norm(dim=1))
            before = now
    first, second = (torch.stack([c for n in half for c in changes[n]]).mean(dim=0) for half in (encoder, decoder))
    return first.tolist(), second.tolist()


def measure(seed: int) -> Found:
    """Draw the same prompts and seeds in full, with both lists of key steps, and with fewer plain steps."""
    pipe, rng = pipeline(), torch.Generator().manual_seed(seed)
    asked = {a: balanced(words, PICTURES, rng) for a, words in WORDS.items()}
    prompts = [sketch.prompt(**{a: asked[a][i] for a in WORDS}) for i in range(PICTURES)]
    seeds = [1000 * seed + i for i in range(PICTURES)]
    draw = lambda steps=STEPS: pipe.draw(prompts, seeds, sampling_steps=steps, scheduler="ddim")
    alone = lambda i: pipe.draw(prompts[i], seeds[i], sampling_steps=STEPS, scheduler="ddim")

    full, few, plain = draw(), draw(len(SD_KEYS)), draw(plain_steps(pipe))
    without = _seconds(alone)
    with FasterDiffusion().patch(pipe):
        listed, within = draw(), _seconds(alone)
    with FasterDiffusion(keys=UNIFORM).patch(pipe):
        uniform = draw()
    read = oracle.load()
    right = lambda x: oracle_alignment(read(x), oracle.WORDS, prompts).tolist()
    distance = lambda x: (x - full).square().mean(dim=(1, 2, 3)).tolist()
    return {
        "few-steps": (distance(listed), distance(few)),
        "uniform": (distance(listed), distance(uniform)),
        "equal-cost": (distance(listed), distance(plain)),
        "quality": (right(listed), right(plain)),
        "time": (within, without),
        "features": feature_changes(pipe, prompts[:WATCHED], seeds[:WATCHED]),
    }


def _seconds(draw: Callable[[int], Tensor]) -> list[float]:
    """Seconds for each of some pictures drawn alone, after one more to warm up."""
    draw(0)
    taken = []
    for i in range(TIMED):
        began = time.perf_counter()
        draw(i)
        taken.append(time.perf_counter() - began)
    return taken


_DISTANCE = "Mean squared distance to the picture of 50 plain steps and the same seed, pixels in [0, 1]."

EXPERIMENT = Experiment(
    name="faster-diffusion",
    paper="arXiv 2312.09608",
    claims={
        "few-steps": Claim(
            "With the paper's 9 key steps of 50, pictures are nearer to the full run's than those of 9 DDIM steps.",
            "50 steps, 9 key steps (the paper's list)",
            "9 DDIM steps",
            _DISTANCE,
            better="lower",
        ),
        "uniform": Claim(
            "Key steps dense at the start keep pictures nearer to the full run than as many at equal distances.",
            "the paper's list",
            "every sixth step",
            _DISTANCE,
            better="lower",
        ),
        "equal-cost": Claim(
            "For the operations it takes, encoder propagation stays nearer to the full run than fewer plain steps.",
            "50 steps, 9 key steps",
            "plain DDIM with as many operations",
            _DISTANCE,
            better="lower",
        ),
        "quality": Claim(
            "For the operations it takes, its pictures show more of what was asked for than fewer plain steps do.",
            "50 steps, 9 key steps",
            "plain DDIM with as many operations",
            "Share of the attributes named in the prompt that the oracle reads off the picture.",
        ),
        "time": Claim(
            "It takes less time than the plain run of as many steps.",
            "50 steps, 9 key steps, decoders in parallel",
            "50 plain DDIM steps",
            "Seconds a picture, drawn alone, autoencoder and text encoder included.",
            better="lower",
        ),
        "features": Claim(
            "From step to step the encoder's features change less than the decoder's.",
            "down blocks and middle block",
            "up blocks",
            "Mean relative change of a block's output between adjacent steps of 50.",
            better="lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="the paper's settings throughout; nothing was tuned on this model",
    measure=measure,
    cost=65,
    timed=True,
    notes="The embedded network has two levels and latents of 8 x 8, Stable Diffusion's four and 64 x 64; the last "
    "claim is the premise of the others.",
)
