"""What protection is meant to spoil: img2img, inpainting and a word learned from pictures, by any family's pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.noise.process import compose
from sfumato.pipeline import Noised, Text2Image
from sfumato.pipeline.contract import Guide
from sfumato.train.loop import Run
from sfumato.train.recipe import Loose, Recipe
from sfumato.train.schedule import Tuning
from sfumato.train.words import denoising_loss

STRENGTHS = (0.01, 0.05, 0.1, 0.2, 0.3)
"""The paper's, of 100 DDIM steps without guidance."""
INIT_WORDS = ("object", "shape", "art", "photo", "a")


def edited(
    p: Text2Image,
    pictures: Float[Tensor, "n 3 side side"],
    seeds: Sequence[int],
    *,
    prompt: str = "a photo",
    strength: float = 0.3,
    sampling_steps: int = 100,
) -> Float[Tensor, "n 3 side side"]:
    """SDEdit: pictures in [0, 1] with noise on them, drawn to the end by DDIM (on flows Euler), without guidance."""
    strength = max(strength, 1 / sampling_steps)
    return _drawn(p, prompt, seeds, pictures.shape[-1], sampling_steps, start=Noised(pictures, strength))


def inpainted(
    p: Text2Image,
    pictures: Float[Tensor, "n 3 side side"],
    seeds: Sequence[int],
    mask: Float[Tensor, "1 1 side side"],
    *,
    prompt: str = "a photo",
    sampling_steps: int = 100,
) -> Float[Tensor, "n 3 side side"]:
    """What is drawn where ``mask`` is 1, around what is kept where it is 0, by a pipeline that was not made for it.

    In every step the prediction outside the mask is the one that leads to the picture's own latent.
    """
    with torch.no_grad():
        known = p.encode_image((2 * pictures - 1).to(p.device))
    open_ = torch.nn.functional.adaptive_max_pool2d(mask, known.shape[-2:]).to(known)
    return _drawn(p, prompt, seeds, pictures.shape[-1], sampling_steps, guide=around(p, known, open_))


def around(p: Text2Image, known: Float[Tensor, "n channel h w"], open_: Float[Tensor, "1 1 h w"]) -> Guide:
    """A guide by which latents come to be ``known`` where ``open_`` is 0."""

    def guide(pred: Tensor, z: Tensor, t: float, cond: Any) -> Tensor:
        alpha, sigma = p.process.alpha_sigma(torch.tensor([t], dtype=torch.float64), z)
        x0 = known.to(z)
        eps = (z - alpha * x0) / sigma.clamp_min(1e-6)
        return open_.to(z) * pred + (1 - open_.to(z)) * compose(x0, eps, alpha, sigma, p.denoiser.prediction)

    return guide


def half(side: int) -> Float[Tensor, "1 1 side side"]:
    """A mask whose right half is to be drawn anew."""
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 2 :] = 1
    return mask


@dataclass(frozen=True, kw_only=True)
class WordSettings(Tuning):
    """Textual inversion (arXiv:2208.01618) of a few pictures, with short settings."""

    updates: int = 300
    batch: int = 4
    lr: float = 5e-3
    workers: int = 0


@dataclass
class Word(Recipe):
    """Learns the rows of a new word from latents, everything else frozen."""

    p: Text2Image
    token: Any
    latents: Float[Tensor, "n channel h w"]
    name: str = field(default="protect-word", init=False)
    title: str = field(default="learning a word", init=False)

    def __post_init__(self) -> None:
        self.rows = Loose(self.token.parameters())

    @property
    def device(self) -> torch.device:
        return self.p.device

    @property
    def dtype(self) -> torch.dtype:
        return self.p.dtype

    def modules(self) -> dict[str, nn.Module]:
        return {"word": self.rows}

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Tensor]:
        steps = self.p.clock.timesteps
        at = torch.randint(len(self.latents), (size,), generator=rng)
        t = (torch.randint(steps, (size,), generator=rng) + 1) / steps
        return {"at": at, "t": t, "eps": torch.randn(size, *self.latents.shape[1:], generator=rng)}

    def loss(self, batch: dict[str, Tensor], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        z0 = self.latents[batch["at"].to(self.latents.device)]
        cond = self.p.encode([f"a photo of {self.token.word}"], grad=True)
        return denoising_loss(self.p, z0, batch["t"].cpu(), batch["eps"].to(z0), cond[[0] * len(z0)]), {}


def imitated(
    p: Text2Image,
    pictures: Float[Tensor, "n 3 side side"],
    seeds: Sequence[int],
    *,
    settings: WordSettings | None = None,
    sampling_steps: int = 25,
    progress: bool = False,
) -> Float[Tensor, "m 3 side side"]:
    """Pictures of a word that was learned from ``pictures`` (in [0, 1]), one a seed; ``p`` is left as it was."""
    settings = settings or WordSettings()
    with torch.no_grad():
        latents = torch.cat([p.encode_image((2 * x - 1).to(p.device)) for x in pictures.split(8)])
    with p.add_token(new_word(p), neutral_word(p)) as token:
        Run(Word(p, token, latents), settings, None, settings.beyond()).fit(progress)
        asked = f"a photo of {token.word}"
        return p.draw([asked], list(seeds), sampling_steps=sampling_steps, size=pictures.shape[-1])


def new_word(p: Text2Image) -> str:
    """A word that no tokenizer of the pipeline knows."""
    known = [tokenizer.get_vocab() for tokenizer in p.tokenizers]
    return next(w for w in (f"<p{i}>" for i in range(10**6)) if not any(w in vocab for vocab in known))


def neutral_word(p: Text2Image) -> str:
    """The first of `INIT_WORDS` that is one token of every tokenizer.

    Raises:
        BadInput: none is.
    """
    for word in INIT_WORDS:
        if all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for tokenizer in p.tokenizers):
            return word
    raise BadInput(f"none of {', '.join(INIT_WORDS)} is one word of this model: leave textual inversion out")


def _drawn(
    p: Text2Image, prompt: str, seeds: Sequence[int], side: int, sampling_steps: int, **how: Any
) -> Float[Tensor, "n 3 side side"]:
    steps = p.distilled_steps or sampling_steps
    settings: dict[str, Any] = {} if p.distilled_steps else {"scheduler": "ddim"}
    return p.draw([prompt], list(seeds), sampling_steps=steps, cfg_scale=1.0, size=side, **settings, **how)
