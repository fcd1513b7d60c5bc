"""The network of prototypes that are points: what it predicts, and by which of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .prototypes import in_colour, squared_distances
from .same import decoder, encoder


@dataclass(frozen=True)
class Reason:
    """What one prototype has to do with a decision.

    Attributes:
        prototype: its number.
        distance: squared.
        weights: its row of W.
        contributions: what it adds to each class's logit, distance times weight. Being far from a prototype takes away
            from the class of its most negative weight.
        picture: the decoded prototype, in [-1, 1].
    """

    prototype: int
    distance: float
    weights: Float[Tensor, "classes"]
    contributions: Float[Tensor, "classes"]
    picture: Float[Tensor, "3 size size"]


class Net(nn.Module):
    """An autoencoder, prototypes among its latents, and one matrix from squared distances to logits."""

    prototypes: Tensor
    weight: Tensor

    def __init__(
        self, classes: int, prototypes: int, size: int, channels: int, widths: tuple[int, ...], init_std: float,
        fixed: float | None = None,
    ):  # fmt: skip
        """``fixed``: what other classes weigh where the last layer is not learned."""
        super().__init__()
        self.channels = channels
        self.encoder, sides = encoder(size, (channels, *widths))
        self.decoder = decoder(sides, (channels, *widths))
        self.side, self.deepest = sides[-1], widths[-1]
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                if init_std:
                    nn.init.normal_(module.weight, std=init_std)
                nn.init.zeros_(module.bias)
        self.prototypes = nn.Parameter(torch.rand(prototypes, self.side**2 * self.deepest))
        if fixed is None:
            self.weight = nn.Parameter(torch.rand(prototypes, classes))
        else:
            own = torch.arange(prototypes)[:, None] % classes == torch.arange(classes)
            self.register_buffer("weight", torch.where(own, -1.0, fixed))

    def seen(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n c size size"]:
        """Pictures in [-1, 1] as the encoder sees them: in [0, 1], the mean of their channels where it sees grey."""
        x = (x + 1) / 2
        return x.mean(1, keepdim=True) if self.channels == 1 else x

    def encode(self, x: Float[Tensor, "n c size size"]) -> Float[Tensor, "n q"]:
        """Pictures in [0, 1] to latents, in the order row, column, channel."""
        return self.encoder(x).movedim(1, -1).flatten(1)

    def decode(self, latent: Float[Tensor, "n q"]) -> Float[Tensor, "n c size size"]:
        """Latents to pictures in [0, 1]."""
        return self.decoder(latent.unflatten(1, (self.side, self.side, self.deepest)).movedim(-1, 1))

    def features(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n q"]:
        return self.encode(self.seen(x))

    def distances(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n m"]:
        """Squared, to every prototype."""
        return squared_distances(self.features(x), self.prototypes)

    def from_features(self, features: Float[Tensor, "n q"]) -> Float[Tensor, "n classes"]:
        """Logits of these features."""
        return squared_distances(features, self.prototypes) @ self.weight

    def forward(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n classes"]:
        return self.from_features(self.features(x))

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "n 3 size size"]) -> Int[Tensor, "n"]:
        """The class of each picture."""
        return self(x).argmax(1)

    @torch.no_grad()
    def prototype_images(self) -> Float[Tensor, "m 3 size size"]:
        """The decoded prototypes, in [-1, 1]."""
        return in_colour(self.decode(self.prototypes)) * 2 - 1

    def prototype_classes(self) -> Int[Tensor, "m"]:
        """The class of each prototype: that of its most negative weight."""
        return self.weight.argmin(1)

    @torch.no_grad()
    def explain(self, x: Float[Tensor, "n 3 size size"]) -> list[list[Reason]]:
        """For each picture all prototypes, the nearest first."""
        d, pictures = self.distances(x), self.prototype_images()
        return [
            [Reason(j, float(row[j]), self.weight[j], row[j] * self.weight[j], pictures[j])
             for j in row.argsort(stable=True).tolist()]
            for row in d
        ]  # fmt: skip
