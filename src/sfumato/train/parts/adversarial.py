"""GANs as the loop sees them: hinge losses, by turns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.train import draw
from sfumato.train.recipe import Recipe, Turn


def discriminator_loss(real: Float[Tensor, "n 1"], fake: Float[Tensor, "n 1"]) -> Float[Tensor, ""]:
    """The hinge: E[relu(1 - D(x))] + E[relu(1 + D(G(z)))]."""
    return relu(1 - real).mean() + relu(1 + fake).mean()


def generator_loss(fake: Float[Tensor, "n 1"]) -> Float[Tensor, ""]:
    """-E[D(G(z))]."""
    return -fake.mean()


@torch.no_grad()
def begun(net: nn.Module) -> nn.Module:
    """The first weights, as in the published code: convolutions' by Xavier's uniform rule, batch normalisation's drawn
    from N(1, 0.02), its biases 0; transposed convolutions, linear layers and other biases stay as torch draws them.

    Differs from it: there Xavier's do not reach convolutions under spectral normalisation, which are moved to the GPU
    first. Their scale is divided out, so only the size of their first steps is another.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            normed = hasattr(layer, "parametrizations")
            nn.init.xavier_uniform_(layer.parametrizations.weight.original if normed else layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)
    return net


@dataclass(frozen=True)
class Rates:
    """How the two of a GAN take turns."""

    generator: float
    discriminator: float
    critic_updates: int
    ema: float = 0.0


class Adversarial(Recipe):
    """Hinge losses by turns; what is drawn and what it is judged by is up to a subclass."""

    partial = True

    def __init__(self, pictures: Pictures, latent: int, rates: Rates):
        self.pictures, self.latent, self.rates = pictures, latent, rates

    @abstractmethod
    def fake(self, z: Float[Tensor, "n latent"], step: int) -> Float[Tensor, "n 3 h w"]:
        """Pictures of the generator whose turn it is."""

    @abstractmethod
    def judge(self, x: Float[Tensor, "n 3 h w"], step: int) -> Float[Tensor, "n 1"]:
        """What the discriminator whose turn it is says of them."""

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        rows = draw.integers(len(self.pictures), size, rng).tolist()
        return {"x": to_tensor([self.pictures.picture(row) for row in rows]), "step": step}

    def turns(self) -> list[Turn]:
        r = self.rates
        first = Turn(
            name="discriminator", loss=self.first_loss, trains=["discriminator"], lr=r.discriminator, ema=0.0,
            times=r.critic_updates, fresh=True,
        )  # fmt: skip
        second: dict[str, Any] = {"trains": ["generator"], "lr": r.generator, "ema": r.ema, "fresh": True}
        return [first, Turn(name="generator", loss=self.loss, **second)]

    def first_loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the discriminator."""
        x, step = batch["x"].to(self._where), batch["step"]
        with torch.no_grad():
            fake = self.fake(self._noise(len(x), rng), step)
        return discriminator_loss(self.judge(x, step), self.judge(fake, step)), {}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the generator."""
        step = batch["step"]
        return generator_loss(self.judge(self.fake(self._noise(len(batch["x"]), rng), step), step)), {}

    def _noise(self, n: int, rng: torch.Generator) -> Tensor:
        return draw.normal((n, self.latent), rng).to(self._where)

    @property
    def _where(self) -> torch.device:
        return next(self.modules()["generator"].parameters()).device


class Pair(Adversarial):
    """One generator and one discriminator."""

    name = "eagan"
    title = "training what was found"

    def __init__(self, generator: nn.Module, discriminator: nn.Module, *rest: Any):
        super().__init__(*rest)
        self.generator, self.discriminator = generator, discriminator

    def modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def fake(self, z: Tensor, step: int) -> Tensor:
        return self.generator(z)

    def judge(self, x: Tensor, step: int) -> Tensor:
        return self.discriminator(x)
