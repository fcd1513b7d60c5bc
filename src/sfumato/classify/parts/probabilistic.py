"""The network of probabilistic prototypes: what it predicts, why, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .gaussians import Distributions, Family
from .prototypes import in_colour, squared_distances
from .uncertainty import TINY, of_labels, overlap, percentile

KEPT = 1000
"""Training pictures of each class whose distances are kept."""
Kind = Literal["total", "aleatoric", "epistemic", "explanatory_overlap", "explanatory_percentile"]
"""total = aleatoric + epistemic, in nats; the explanatory ones in [0, 1]."""


@dataclass(frozen=True)
class Explanation:
    """How well a class explains a picture.

    Attributes:
        label: the class's number.
        share: its probability.
        distances: to draws of its prototype.
        mode: its decoded prototype, in [-1, 1].
        draws: decoded draws, the nearest first.
    """

    label: int
    share: float
    distances: Float[Tensor, "samples"]
    mode: Float[Tensor, "3 size size"]
    draws: Float[Tensor, "some 3 size size"]


class Net(nn.Module):
    """An autoencoder, distributions of prototypes among its latents, and one matrix from distances to logits.

    Prototype j is of class j modulo their number. Draws come from a generator seeded by 0 unless one is given, so that
    the same picture gets the same answer.
    """

    reference: Tensor

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, classes: int, prototypes: int, dim: int, family: Family,
        components: int, prior_std: float, samples: int, channels: int,
    ):  # fmt: skip
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.classes, self.dim, self.samples, self.channels = classes, dim, samples, channels
        self.prototypes = Distributions(prototypes, dim, family, components, prior_std)
        own = torch.arange(prototypes)[:, None] % classes == torch.arange(classes)
        self.weight = nn.Parameter(-0.5 * own + 1e-8 * (2 * torch.rand(prototypes, classes) - 1))
        self.register_buffer("reference", torch.full((classes, KEPT), -1.0))

    # Latents and distances

    def seen(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n c size size"]:
        """Pictures in [-1, 1] as the encoder sees them: the mean of their channels where it sees grey."""
        return x.mean(1, keepdim=True) if self.channels == 1 else x

    def encode(self, x: Float[Tensor, "n c size size"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"] | None]:
        """Mean and log-variance of latents; of an encoder that gives points, these and None."""
        mean, *rest = self.encoder(x).split(self.dim, dim=1)
        return mean, rest[0] if rest else None

    def decode(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n c size size"]:
        """Latents to pictures in [-1, 1]."""
        return self.decoder(z)

    def features(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n d"]:
        return self.encode(self.seen(x))[0]

    @staticmethod
    def distances(z: Float[Tensor, "n d"], drawn: Float[Tensor, "samples m d"]) -> Float[Tensor, "n m samples"]:
        """Squared, to every draw of every prototype."""
        samples, m = drawn.shape[:2]
        return squared_distances(z, drawn.flatten(0, 1)).reshape(len(z), samples, m).mT

    def logits(self, d: Float[Tensor, "n m samples"]) -> Float[Tensor, "n samples classes"]:
        """d W of every draw."""
        return d.mT @ self.weight

    def by_class(self, d: Float[Tensor, "n m samples"]) -> Float[Tensor, "n classes samples"]:
        """To each class's nearest prototype."""
        return d.unflatten(1, (-1, self.classes)).amin(1)

    def draw(self, samples: int | None = None, generator: torch.Generator | None = None) -> Float[Tensor, "s m d"]:
        """Draws of all prototypes."""
        return self.prototypes.sample(samples or self.samples, generator or torch.Generator().manual_seed(0))

    # Predictions

    def from_features(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Logarithms of the probabilities, of these features."""
        return (self._shares(features, self.draw()) + TINY).log()

    def forward(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n classes"]:
        """Logarithms of the probabilities."""
        return self.from_features(self.features(x))

    def predict_proba(
        self, x: Float[Tensor, "n 3 size size"], samples: int | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n classes"]:
        """The mean over draws."""
        return self._shares(self.features(x), self.draw(samples, generator))

    def _shares(self, z: Float[Tensor, "n d"], drawn: Float[Tensor, "samples m d"]) -> Float[Tensor, "n classes"]:
        return self.logits(self.distances(z, drawn)).softmax(-1).mean(1)

    @torch.no_grad()
    def predict_modes(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n classes"]:
        """Probabilities by the prototypes' modes alone."""
        return self.logits(self.distances(self.features(x), self.prototypes.mode()[None])).softmax(-1)[:, 0]

    @torch.no_grad()
    def uncertainty(
        self, x: Float[Tensor, "n 3 size size"], samples: int | None = None, generator: torch.Generator | None = None,
        reference: Literal["distance", "class"] = "distance",
    ) -> dict[str, Float[Tensor, "n"]]:  # fmt: skip
        """All kinds of `Kind`, by name; ``reference``: whether percentiles are of the class whose prototype is nearest
        on average, or of the predicted one."""
        d = self.distances(self.features(x), self.draw(samples, generator))
        p, d = self.logits(d).softmax(-1), self.by_class(d)
        predicted, mean = p.mean(1).argmax(1), d.mean(-1)
        which = mean.argmin(1) if reference == "distance" else predicted
        return {
            **of_labels(p), "explanatory_overlap": overlap(d.double(), predicted).to(d),
            "explanatory_percentile": percentile(self.reference, mean, which).to(d),
        }  # fmt: skip

    @torch.no_grad()
    def select(self, x: Float[Tensor, "n 3 size size"], most: float, kind: Kind = "epistemic") -> Int[Tensor, "n"]:
        """The class of each picture, or -1 where the uncertainty of this kind is above ``most``."""
        said = self.predict_proba(x).argmax(1)
        return torch.where(self.uncertainty(x)[kind] <= most, said, -1)

    @torch.no_grad()
    def explain(
        self, x: Float[Tensor, "n 3 size size"], samples: int | None = None, generator: torch.Generator | None = None,
        shown: int = 3,
    ) -> list[list[Explanation]]:  # fmt: skip
        """For each picture how well every class explains it: the predicted class first, then the nearest rivals."""
        drawn = self.draw(samples, generator)
        d = self.distances(self.features(x), drawn)
        p, found = self.logits(d).softmax(-1).mean(1), []
        modes = self.images(self.prototypes.mode())
        for row, share, near in zip(d, p, self.by_class(d), strict=True):
            first = int(share.argmax())
            order = [first, *(k for k in near.mean(-1).argsort(stable=True).tolist() if k != first)]
            told = []
            for k in order:
                own = row[k :: self.classes]
                best = k + self.classes * int(own.mean(-1).argmin())
                draws = self.images(drawn[row[best].argsort()[:shown], best])
                told.append(Explanation(k, float(share[k]), near[k], modes[best], draws))
            found.append(told)
        return found

    @torch.no_grad()
    def images(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n 3 size size"]:
        """Decoded latents, in [-1, 1]."""
        return in_colour(self.decode(z))

    def prototype_images(self) -> Float[Tensor, "m 3 size size"]:
        """The decoded modes."""
        return self.images(self.prototypes.mode())

    @torch.no_grad()
    def keep(self, z: Float[Tensor, "n d"], y: Int[Tensor, "n"]) -> None:
        """Keep the mean distances of training latents to the prototypes of their classes, the first 1000 of each."""
        d = self.by_class(self.distances(z.to(self.reference), self.draw())).mean(-1)
        self.reference.fill_(-1.0)
        for k in range(self.classes):
            own = d[y.to(d.device) == k, k][:KEPT]
            self.reference[k, : len(own)] = own
