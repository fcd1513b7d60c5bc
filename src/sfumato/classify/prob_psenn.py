"""Prob-PSENN: prototypes that are distributions, and with them explanations that know how sure they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from sfumato.data.pictures import Pictures
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive, Share
from sfumato.train import draw
from sfumato.train.recipe import Turn

from .base import Labelling
from .parts import dcgan
from .parts.by_distance import ByDistance
from .parts.explanations import pages
from .parts.gaussians import Family
from .parts.probabilistic import Net
from .parts.prototypes import latents, some
from .parts.sheet import Sheet

CLIP = (-1.0, 10_000.0)
"""Between which the interpretability term of a picture is kept."""


def loss_terms(
    logits: Float[Tensor, "n samples classes"], log_q: Float[Tensor, "n m"], y: Int[Tensor, "n"],
    decoded: Float[Tensor, "n c h w"], target: Float[Tensor, "n c h w"],
    mean: Float[Tensor, "n dim"] | None = None, logvar: Float[Tensor, "n dim"] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss's terms, before their weights.

    - ``nll``: -log p of the label, averaged over samples of prototypes and pictures;
    - ``reconstruction``: squared errors, averaged over pixels;
    - ``prototypes`` R1: the least -log q_j(z) of the batch, averaged over prototypes;
    - ``examples`` R2: -log q(z) under the distribution of the own class, kept in [-1, 10000], averaged over pictures;
      where a class has several (prototype j is of class j modulo their number), under their even mixture;
    - ``kl``: of N(mean, exp(logvar)) to N(0, 1), where these are given.

    Args:
        log_q: log-density of each latent under each prototype's distribution.
    """
    classes = logits.shape[-1]
    label = y[:, None, None].expand(-1, logits.shape[1], 1)
    each = log_q.unflatten(1, (-1, classes)).logsumexp(1) - math.log(log_q.shape[1] / classes)
    found = {
        "nll": -logits.log_softmax(-1).gather(-1, label).mean(),
        "reconstruction": (decoded - target).square().mean(),
        "prototypes": (-log_q).min(0).values.mean(),
        "examples": (-each.gather(1, y[:, None])).clamp(*CLIP).mean(),
    }
    if mean is not None and logvar is not None:
        found["kl"] = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1).mean()
    return found


def disturbed(
    x: Float[Tensor, "n 3 h w"], brightness: float, zoom: float, rng: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """Pictures in [-1, 1], each brighter or darker and larger or smaller by up to these shares, borders repeated."""
    n = len(x)
    if brightness:
        x = (x + 2 * brightness * (2 * draw.uniform(n, rng).to(x) - 1)[:, None, None, None]).clamp(-1, 1)
    if zoom:
        scale = 1 + zoom * (2 * draw.uniform(n, rng).to(x) - 1)
        down, across = (torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in x.shape[-2:])
        grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)
        x = grid_sample(x, scale[:, None, None, None] * grid, padding_mode="border", align_corners=True)
    return x


@dataclass(frozen=True, kw_only=True)
class ProbPSENN(ByDistance):
    """Each class has a distribution of prototypes; what varies over draws of them says how unsure an answer is.

    arXiv:2403.13740. Prototypes phi_k ~ q_k are drawn, the same for a whole batch; with squared distances d the class
    probabilities of a draw are softmax(d W), and the prediction is their mean. The loss is nll + 10 reconstruction +
    0.05 (-log q_y(z)) + 0.05 KL of the encoder to N(0, 1). The autoencoder is trained alone first, then q_k is put on
    mean and covariance of the latents of class k, then all is trained. `Net.uncertainty` has three kinds: of the label,
    total = aleatoric + epistemic; and of the explanation, the overlap of the distances to two classes, and how few
    training pictures are as far from their prototype. `Net.select` answers only where it is sure enough. Cost: forward
    and backward passes of two nets of five layers, about a million weights; draws cost next to nothing.

    Differs from the paper: any size that 8 divides. Several prototypes for a class are an extension, as is the start of
    mixtures from data. Differs from the released code: the diagonal family starts from standard deviations where that
    stores variances in their place; the pictures are brightened and zoomed by the recipe, not inside of the encoder.
    Unconfirmed: loss weights, latent size and family are the released model's; learning rate and batch the code's;
    numbers of draws and updates are ours.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **ByDistance.EXAMPLE, "latent": 3, "widths": (4, 4, 4, 8), "samples": 4, "pretrain_updates": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mnist": {"grey": True, "brightness": 0.0, "zoom": 0.0},
        "small-run": {
            "grey": True, "brightness": 0.0, "zoom": 0.0, "data": "digits", "updates": 1500, "pretrain_updates": 400,
            "latent": 16, "batch": 64,
        },
    }  # fmt: skip
    """``mnist``: grey digits and clothes of the paper; ``small-run``: minutes on a CPU, untuned."""

    prototypes: Count | None = None
    """How many distributions, a multiple of the number of classes; by default one for each."""
    latent: Count = 40
    """Dimensions of a latent."""
    family: Family = "gauss_full"
    """Distributions: Gaussians with a diagonal or a full covariance, or mixtures of full ones."""
    components: Count = 2
    """Of "mix": Gaussians in each."""
    backbone: Literal["vae", "ae"] = "vae"
    """Whether the encoder is one of a variational autoencoder or gives a point."""
    grey: bool = False
    """See the mean of the colours only, as for handwritten digits."""
    widths: tuple[Count, Count, Count, Count] | None = None
    """Channels of the encoder's convolutions; by default 64, 128, 256 and 512, or 32, 32, 64 and 256 where grey."""
    samples: Count = 30
    """Draws of all prototypes, in training and in prediction."""
    pretrain_updates: Natural = 4000
    """Updates at the start that train the autoencoder only."""
    init: Literal["data", "random"] = "data"
    """Distributions start from the latents of the training pictures, after those updates; or by chance."""
    prior_std: Positive = 1.0
    """Of "random": how far apart the means are."""
    nll_weight: NotNegative = 1.0
    """Weight of the label's -log p."""
    reconstruction_weight: NotNegative = 10.0
    """Weight of the squared errors, averaged over pixels."""
    prototype_weight: NotNegative = 0.0
    """Weight of R1: some latent of the batch is likely under each prototype."""
    example_weight: NotNegative = 0.05
    """Weight of R2: each latent is likely under the prototype of its class."""
    kl_weight: NotNegative = 0.05
    """Weight of the encoder's distance to N(0, 1)."""
    brightness: Share = 0.2
    """What the encoder sees in training is brighter or darker by up to this share of the range."""
    zoom: Share = 0.1
    """And larger or smaller by up to this share."""
    size: Count = 32
    updates: Natural = 20_000
    batch: Count = 128
    lr: Positive = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 8:
            raise BadInput(f"size must be a multiple of 8, got {self.size}: give {max(8, round(self.size / 8) * 8)}")
        self.require_several("batch normalisation needs several pictures")
        if self.pretrain_updates > self.updates:
            raise BadInput(
                f"pretrain_updates ({self.pretrain_updates}) are some of updates ({self.updates}): give fewer"
            )

    def network(self, labels: tuple[str, ...]) -> Net:
        """A fresh network.

        Raises:
            BadInput: fewer prototypes than classes, or so many that classes would have different numbers.
        """
        n, classes = self.prototypes or len(labels), len(labels)
        if n < classes or n % classes:
            wrong = f"{n} prototypes cannot " + ("stand for" if n < classes else "be spread evenly over")
            raise BadInput(f"{wrong} {classes} classes: give {classes} or a multiple, or leave prototypes out")
        channels = 1 if self.grey else 3
        widths = self.widths or ((32, 32, 64, 256) if self.grey else (64, 128, 256, 512))
        outputs = self.latent * (2 if self.backbone == "vae" else 1)
        encoder = dcgan.encoder(channels, widths, self.size, outputs)
        decoder = dcgan.decoder(self.latent, widths, self.size, channels)
        family = (self.family, self.components, self.prior_std)
        return Net(encoder, decoder, classes, n, self.latent, *family, self.samples, channels)

    def parts(self, used: Collection[str] | None = None) -> tuple[Pictures, Pictures, str]:
        """As every classifier's; and where prototypes start from data, a class needs two training pictures."""
        seen, unseen, told = super().parts(used)
        if self.init == "data":
            counts = Counter(seen.label(row) for row in range(len(seen)))
            names = seen.label_names
            if short := [n for i, n in enumerate(names) if counts[i] < 2 and (used is None or n in used)]:
                raise BadInput(
                    f"the class {short[0]!r} has one picture to train on, which says nothing of how its prototype "
                    'varies: add pictures of it, or start with init="random"'
                )
        return seen, unseen, told

    def recipe(self, net: nn.Module, pictures: Pictures) -> Labelling:
        made = Probabilistic(self, net, pictures)
        if not self.pretrain_updates:
            made.start()
        return made

    def terms(self, net: Net, x: Tensor, y: Tensor | None, rng: torch.Generator) -> dict[str, Tensor]:
        """The terms of the loss; without labels, those of the autoencoder."""
        target = net.seen(x)
        mean, logvar = net.encode(net.seen(disturbed(x, self.brightness, self.zoom, rng)))
        z = mean
        if logvar is not None:
            z = mean + (0.5 * logvar).exp() * draw.normal(tuple(mean.shape), rng).to(mean)
        decoded = net.decode(z)
        if y is not None:
            logits = net.logits(net.distances(z, net.prototypes.sample(self.samples, rng)))
            return loss_terms(logits, net.prototypes.log_prob(z), y, decoded, target, mean, logvar)
        found = {"reconstruction": (decoded - target).square().mean()}
        if logvar is not None:
            found["kl"] = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1).mean()
        return found

    def loss(
        self, net: nn.Module, x: Float[Tensor, "batch 3 size size"], y: Int[Tensor, "batch"] | None,
        rng: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        assert isinstance(net, Net)
        terms = self.terms(net, x, y, rng)
        weights = {
            "nll": self.nll_weight, "reconstruction": self.reconstruction_weight, "prototypes": self.prototype_weight,
            "examples": self.example_weight, "kl": self.kl_weight,
        }  # fmt: skip
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms

    def settle(self, net: nn.Module, pictures: Pictures) -> None:
        """Keep how far training pictures are from the prototypes of their classes, which percentiles are of."""
        assert isinstance(net, Net)
        rows = some(pictures, len(pictures), self.seed)
        y = torch.tensor([pictures.label(row) for row in rows])
        net.keep(latents(net, pictures, rows, self.batch), y)

    def sheets(self, folder: str | Path) -> tuple[Sheet, ...]:
        """Prototypes and draws of them, decisions, pictures that it is unsure of, and what answering fewer would do."""
        net, (_, unseen, _) = self.read(folder), self.parts()
        assert isinstance(net, Net)
        return pages(net, unseen, self.batch, self.seed)


class Probabilistic(Labelling):
    """The autoencoder alone, then all; between the two the prototypes are put where the latents are."""

    method: ProbPSENN
    net: Net
    partial = True

    def batch(self, step: int, rng: torch.Generator, size: int) -> Any:
        return (*super().batch(step, rng, size), step)

    def loss(self, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x, y, step = batch
        device = next(self.net.parameters()).device
        alone = step < self.method.pretrain_updates
        return self.method.loss(self.net, x.to(device), None if alone else y.to(device), rng)

    def after_update(self, turn: Turn, step: int) -> None:
        if step == self.method.pretrain_updates:
            self.start()

    def start(self) -> None:
        """Fit the distributions to the latents of all training pictures, if that is how they start."""
        if self.method.init != "data":
            return
        training = self.net.training
        rows = range(len(self.pictures))
        z = latents(self.net.eval(), self.pictures, rows, self.method.batch)
        self.net.train(training)
        y = torch.tensor([self.pictures.label(row) for row in rows])
        self.net.prototypes.fit(z, y, self.net.classes, torch.Generator().manual_seed(self.method.seed))
