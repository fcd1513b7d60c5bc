"""The second stage of latent diffusion: network and text encoder together, on latents that were encoded once."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from . import draw
from .recipe import Recipe
from .shapes import SHAPES, Shape


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas with v-prediction; trailing steps, so that sampling starts from the noisiest level."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


class DiffusionRecipe(Recipe):
    """Joint training of a network and its text encoder on cached latents, v-prediction with min-SNR weights.

    ``group`` neighbouring rows (a scene and its twin) stand in a batch together; ``tilt`` draws noisy times more often,
    with a density proportional to t^tilt; ``gamma`` 0 weighs all times alike; ``power`` is the weights' exponent.
    """

    name = "diffusion"

    def __init__(
        self,
        network,
        text,
        tokenizer,
        scheduler,
        latents: Tensor,
        captions: list[str],
        dropout: float,
        gamma: float,
        group: int = 1,
        tilt: float = 0.0,
        power: float = 1.0,
        shape: Shape = SHAPES["unet"],
    ):
        self.network, self.text, self.scheduler, self.latents, self.shape = network, text, scheduler, latents, shape
        self.dropout, self.gamma, self.power, self.group, self.tilt = dropout, gamma, power, group, tilt
        self.ids, self.empty = shape.ids(tokenizer, captions).to(torch.int32), shape.ids(tokenizer, [""])

    def modules(self) -> dict[str, nn.Module]:
        return {self.shape.component: self.network, "text_encoder": self.text}

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        rows = draw.grouped(len(self.latents), size, self.group, rng)
        ids = self.ids[rows].long()
        drop = draw.uniform(size, rng) < self.dropout
        return {"x": self.latents[rows], "ids": torch.where(drop[:, None], self.empty, ids)}

    def loss(self, batch: dict[str, Tensor], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.network.device
        x, ids = batch["x"].to(device), batch["ids"].to(device)
        eps = draw.normal(x.shape, rng).to(device)
        times = len(self.scheduler.alphas_cumprod)
        if self.tilt:
            t = (times * draw.uniform(len(x), rng) ** (1 / (1 + self.tilt))).long().clamp(max=times - 1).to(device)
        else:
            t = draw.integers(times, len(x), rng).to(device)
        alpha2 = self.scheduler.alphas_cumprod.to(device)[t][:, None, None, None]
        alpha, sigma = alpha2.sqrt(), (1 - alpha2).sqrt()
        v = self.shape.predict(self.network, self.text, alpha * x + sigma * eps, t, ids).float()
        snr = alpha2 / (1 - alpha2)
        weight = (snr.clamp(max=self.gamma) / (snr + 1)) ** self.power if self.gamma else 1.0
        error = (v - (alpha * eps - sigma * x)).square()
        return (weight * error).mean(), {"v_error": error.mean().detach()}
