"""A customisation as the training loop sees it: latents of a few pictures, noise, times, and the texts said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.pipeline import Text2Image
from sfumato.train.draw import integers, normal, uniform
from sfumato.train.recipe import Recipe
from sfumato.train.words import Latents


@dataclass(frozen=True)
class Given:
    """What is learned from.

    Attributes:
        latents: of every picture.
        texts: for each picture what may be said of it, with {} where the new word stands.
        pictures: themselves, in [0, 1].
    """

    latents: Latents
    texts: Sequence[Sequence[str]]
    pictures: Float[Tensor, "n 3 height width"] | None = None


@dataclass(frozen=True)
class Drawn:
    """The rows of an update.

    Attributes:
        at: which pictures.
        mirrored: which of them are mirrored.
        z0: clean latents, of the autoencoder's posterior.
        t: times, one each of the network's own timesteps.
        eps: noise.
        said: for each row one of its picture's texts.
        step: the number of the update, from 0.
    """

    at: Int[Tensor, "batch"]
    mirrored: Int[Tensor, "batch"]
    z0: Float[Tensor, "batch channel h w"]
    t: Float[Tensor, "batch"]
    eps: Float[Tensor, "batch channel h w"]
    said: list[str]
    step: int = 0


StepLoss = Callable[[Drawn, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""(rows, generator) -> a mean over the rows, and figures to log."""


def of_posterior(
    latents: Latents, rows: tuple[Any, Any], rng: torch.Generator | None
) -> Float[Tensor, "batch channel h w"]:
    """Clean latents of some views of some pictures, drawn anew; without a generator their means."""
    mean = latents.mean[rows]
    return mean if rng is None else mean + latents.std[rows] * normal(mean.shape, rng).to(mean)


class Learning(Recipe):
    """Whatever is trained on a few pictures by one loss; all that is random follows from seed, update and row.

    Args:
        modules: what is trained.
        flip: how often a picture is mirrored.
        sample: draw latents from the posterior; else its mean is taken.
        loss: of one update.
        partial: some update's loss does not reach every parameter.
    """

    def __init__(
        self,
        name: str,
        pipe: Text2Image,
        modules: Mapping[str, nn.Module],
        given: Given,
        loss: StepLoss,
        flip: float = 0.0,
        sample: bool = True,
        partial: bool = False,
    ):
        self.name, self.title, self.pipe, self.partial = name, f"learning by {name}", pipe, partial
        self.trained, self.given, self.step_loss = dict(modules), given, loss
        self.flip, self.sample = flip, sample

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.dtype

    def modules(self) -> dict[str, nn.Module]:
        return self.trained

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        latents, T = self.given.latents.mean, self.pipe.clock.timesteps
        at = integers(latents.shape[1], size, rng)
        return {
            "step": step,
            "at": at,
            "t": (integers(T, size, rng) + 1) / T,
            "text": uniform(size, rng),
            "view": (uniform(size, rng) < self.flip).long(),
            "eps": normal((size, *latents.shape[2:]), rng),
            "posterior": normal((size, *latents.shape[2:]), rng),
        }

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.step_loss(self.drawn(batch), rng)

    def drawn(self, batch: dict[str, Any]) -> Drawn:
        """The rows that a batch's numbers stand for."""
        mean, std = self.given.latents.mean, self.given.latents.std
        rows = (batch["view"].to(mean.device), batch["at"].to(mean.device))
        z0 = mean[rows]
        if self.sample:
            z0 = z0 + std[rows] * batch["posterior"].to(std)
        options = [self.given.texts[i] for i in batch["at"].tolist()]
        said = [some[int(x * len(some))] for some, x in zip(options, batch["text"].tolist(), strict=True)]
        return Drawn(batch["at"], batch["view"], z0, batch["t"].to(z0), batch["eps"].to(z0), said, batch["step"])
