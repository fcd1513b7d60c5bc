"""What the entry of Jump Your Steps measures on models that are trained: codes of pictures, and a text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.data.sketch import caption, scenes
from sfumato.pipeline import TokenModel
from sfumato.sample import JYS
from sfumato.train.discrete import Discrete

from .core import Figures
from .pixels import fresh, trained

STEPS = (4, 8, 16)
DRAWN, CHUNK = 400, 50
CAPTIONS, WINDOW = 4000, 48
SIDE, CODES, PICTURES = 32, 64, 2000
UPDATES, CODE_UPDATES = 600, 400
NETWORK: dict[str, Any] = {
    "width": 64, "depth": 2, "head_dim": 16, "embedding": 64, "updates": UPDATES, "checkpoint_every": UPDATES,
    "warmup": 50, "batch": 64, "lr": 2e-3, "ema": 0.99, "classes": False, "track": "none",
}  # fmt: skip


def text(seed: int) -> str:
    """Captions of the sketch world, one on a line."""
    rng = np.random.default_rng(seed)
    return "\n".join(caption(scene, rng) for scene in scenes(rng, CAPTIONS))


def spelt(written: str, words: set[str]) -> float:
    """The share of a window's whole words, which its ends do not cut, that are ``words``; 0 where there is none."""
    whole = re.findall(r"\w+", written[re.search(r"^\w*", written).end() : re.search(r"\w*$", written).start()])
    return sum(word in words for word in whole) / len(whole) if whole else 0.0


def neighbours(codes: Int[Tensor, "n h w"], values: int) -> Float[Tensor, "values2"]:
    """How often each code stands left of each, and above it, as shares of all pairs."""
    flat = [codes[:, :, :-1] * values + codes[:, :, 1:], codes[:, :-1] * values + codes[:, 1:]]
    count = torch.bincount(torch.cat([x.flatten() for x in flat]), minlength=values**2).double()
    return count / count.sum()


def drawn(model: TokenModel, data: Tensor, seed: int, judge: Callable[[Tensor], list[float]]) -> Figures:
    """Search on ``data``, draw along what is found and in equal steps from the same noise, and judge both."""
    schedule = model.search(data, JYS(sampling_steps=max(STEPS), points=256, kind="euler"))
    seeds = range(1000 * seed, 1000 * seed + DRAWN)
    ways: dict[str, Any] = {"searched": {"schedule": schedule}, "equal": {"scheduler": "euler"}}
    return {
        f"{name} {steps}": judge(model.tokens(None, seeds, sampling_steps=steps, **given))
        for name, given in ways.items()
        for steps in STEPS
    }


def of_text(seed: int) -> Figures:
    """A model of characters; of every window that it writes, the share of words that are spelt as in other captions."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_text(text(seed), encoding="utf-8")
        model: Any = trained(Discrete(tokens="characters", data=str(file), size=WINDOW, seed=seed, **NETWORK))
    other, rng = text(1000 + seed), np.random.default_rng(seed)
    words = set(re.findall(r"\w+", other))
    places = rng.integers(len(other) - WINDOW, size=64)
    symbols = model.defaults["symbols"]
    judge = lambda x: [spelt("".join(symbols[i] for i in row), words) for row in x.tolist()]
    return drawn(model, model.read([other[i : i + WINDOW] for i in places]), seed, judge)


def of_codes(seed: int) -> Figures:
    """A model of codes of pictures; of every `CHUNK`, how far neighbours are from those of other pictures."""
    model: Any = trained(
        Discrete(
            tokens="codes", data="sketch", size=SIDE, codes=CODES, code_channels=(16, 32, 32), pictures=PICTURES,
            code_updates=CODE_UPDATES, seed=seed, **NETWORK,
        )
    )  # fmt: skip
    with torch.no_grad():
        codes = torch.cat([model.encode_image(x) for x in fresh(SIDE, seed, PICTURES).split(64)])
    truth = neighbours(codes, CODES)
    judge = lambda x: [float((neighbours(part, CODES) - truth).abs().sum() / 2) for part in x.split(CHUNK)]
    return drawn(model, codes[:64], seed, judge)
