"""Prototype net: a classifier that compares pictures with a few learned ones, and can show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive
from sfumato.train import draw

from .parts.by_distance import ByDistance
from .parts.elastic import elastic
from .parts.points import Net
from .parts.prototypes import LOOKED_AT, in_colour, latents, some, squared_distances
from .parts.sheet import Row, Sheet

SHOWN = 8
"""Pictures that are explained on the page."""


def loss_terms(
    latent: Float[Tensor, "n q"], prototypes: Float[Tensor, "m q"], weight: Float[Tensor, "m classes"],
    decoded: Float[Tensor, "n c h w"], target: Float[Tensor, "n c h w"], y: Int[Tensor, "n"],
) -> dict[str, Tensor]:  # fmt: skip
    """The loss's four terms, before their weights.

    - ``cross_entropy`` of the logits d W, d being squared distances to the prototypes;
    - ``reconstruction`` R: squared errors, summed over pixels and averaged over pictures;
    - ``prototypes`` R1: of each prototype to the nearest picture of the batch, averaged over prototypes;
    - ``examples`` R2: of each picture to the nearest prototype, averaged over pictures.
    """
    d = squared_distances(latent, prototypes)
    return {
        "cross_entropy": cross_entropy(d @ weight, y),
        "reconstruction": (decoded - target).square().flatten(1).sum(1).mean(),
        "prototypes": d.min(0).values.mean(),
        "examples": d.min(1).values.mean(),
    }


@dataclass(frozen=True, kw_only=True)
class PrototypeNet(ByDistance):
    """A classifier that says which of its prototypes a picture is near, and can decode and show them.

    arXiv:1710.04806. With latents z = f(x) and squared distances d_j = |z - p_j|^2 the logits are d W, without a bias,
    and all is trained together by

        CE + lambda |g(f(x)) - x|^2 + lambda_1 mean_j min_i |p_j - z_i|^2 + lambda_2 mean_i min_j |z_i - p_j|^2,

    on elastically deformed pictures, which are also what is to be reconstructed; errors of pixels are summed. A
    prototype belongs to the class with its most negative weight. Explanations are as faithful as the decoder: the page
    shows beside each prototype the nearest training pictures. Cost: forward and backward passes of two nets of four
    layers, about 2 MMACs a picture of 28 pixels.

    Differs from the paper: any size, and colour. Convolutions are padded as the released code's ("same" as TensorFlow
    has it), so its weights give its numbers. The minimum over pictures is over those of a micro-batch on one process:
    keep batches of ten pictures and more to a prototype. ``last_layer="fixed"`` and ``project`` are extensions.
    Unconfirmed: the three weights of 0.05 (the released code's ratio) and the learning rate.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {**ByDistance.EXAMPLE, "prototypes": 3, "widths": (4, 4, 4, 3), "lr": 0.01}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {
            "ce_weight": 20.0, "reconstruction_weight": 1.0, "prototype_weight": 1.0, "example_weight": 1.0,
            "lr": 0.002, "grey": True,
        },
        "cars": {"prototypes": 11},
        "small-run": {"grey": True, "init_std": 0.0, "lr": 0.002, "batch": 150, "updates": 2000, "data": "digits"},
    }  # fmt: skip
    """``released``: the authors' code, the same ratios at another scale; ``cars``: the paper's, of a prototype a class;
    ``small-run``: minutes on a CPU, untuned."""

    prototypes: Count = 15
    """How many; at least as many as classes."""
    grey: bool = False
    """See the mean of the colours only, as for handwritten digits."""
    widths: tuple[Count, ...] = (32, 32, 32, 10)
    """Channels after each halving of the side; the last is how many a place of the latent has."""
    ce_weight: NotNegative = 1.0
    """Weight of the cross-entropy."""
    reconstruction_weight: NotNegative = 0.05
    """lambda, of the squared errors of pixels, summed over a picture."""
    prototype_weight: NotNegative = 0.05
    """lambda_1: each prototype near some picture."""
    example_weight: NotNegative = 0.05
    """lambda_2: each picture near some prototype."""
    last_layer: Literal["learned", "fixed"] = "learned"
    """W: learned, from U[0, 1); or fixed, prototype j being of class j modulo their number, with the weight -1."""
    other_weight: NotNegative = 0.0
    """Of "fixed": the weight of all other classes."""
    project: bool = False
    """After training, put each prototype on the nearest latent of a training picture."""
    init_std: NotNegative = 0.01
    """Standard deviation of the kernels at the start; 0: torch's own."""
    elastic_sigma: Positive = 4.0
    """Width in pixels of the Gaussian that smooths the elastic deformation."""
    elastic_alpha: NotNegative = 20.0
    """How far in pixels it moves, before smoothing; 0: no deformation."""
    size: Count = 28
    updates: Natural = 330_000
    batch: Count = 250
    lr: Positive = 1e-4

    def network(self, labels: tuple[str, ...]) -> Net:
        """A fresh network.

        Raises:
            BadInput: fewer prototypes than classes.
        """
        if self.prototypes < len(labels):
            raise BadInput(
                f"{self.prototypes} prototypes cannot stand for {len(labels)} classes: give at least as many, as with "
                f"prototypes={len(labels)}"
            )
        fixed = self.other_weight if self.last_layer == "fixed" else None
        channels = 1 if self.grey else 3
        return Net(len(labels), self.prototypes, self.size, channels, self.widths, self.init_std, fixed)

    def loss(
        self, net: nn.Module, x: Float[Tensor, "batch 3 size size"], y: Int[Tensor, "batch"], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(net, Net)
        target = net.seen(x)
        latent = net.encode(target)
        terms = loss_terms(latent, net.prototypes, net.weight, net.decode(latent), target, y)
        weights = (self.ce_weight, self.reconstruction_weight, self.prototype_weight, self.example_weight)
        total = torch.stack([w * term for w, term in zip(weights, terms.values(), strict=True)]).sum()
        right = (squared_distances(latent, net.prototypes) @ net.weight).argmax(1) == y
        return total, {**terms, "right": right.float().mean()}

    def augmented(self, x: Float[Tensor, "batch 3 size size"], rng: torch.Generator) -> Float[Tensor, "batch 3 s s"]:
        x = super().augmented(x, rng)
        if not self.elastic_alpha:
            return x
        # drawn as normal numbers, which do not depend on how a batch is shared; what is below each is uniform
        noise = 2 * torch.special.ndtr(draw.normal((len(x), 2, *x.shape[-2:]), rng)) - 1
        return elastic((x + 1) / 2, noise, self.elastic_sigma, self.elastic_alpha) * 2 - 1

    def settle(self, net: nn.Module, pictures: Pictures) -> None:
        assert isinstance(net, Net)
        if self.project:
            known = latents(net, pictures, range(len(pictures)), self.batch).to(net.prototypes)
            with torch.no_grad():
                net.prototypes.copy_(known[squared_distances(net.prototypes, known).argmin(1)])

    @torch.no_grad()
    def sheets(self, folder: str | Path) -> tuple[Sheet, ...]:
        """The prototypes with the training pictures nearest to them, and some decisions explained."""
        net, (seen, unseen, _) = self.read(folder), self.parts()
        assert isinstance(net, Net)
        labels, pictures, classes = list(seen.label_names), net.prototype_images(), net.prototype_classes().tolist()
        rows = some(seen, LOOKED_AT, self.seed)
        near = squared_distances(net.prototypes, latents(net, seen, rows, self.batch)).argsort(1)[:, :3]
        asked = some(unseen, LOOKED_AT, self.seed)
        d = squared_distances(latents(net, unseen, asked, self.batch), net.prototypes)
        used = Counter(d.argmin(1).tolist())
        found, agree = [], 0
        for j, picture in enumerate(pictures):
            mine = [rows[i] for i in near[j].tolist()]
            agree += seen.label(mine[0]) == classes[j]
            nearest = [(labels[seen.label(row)], to_tensor([seen.picture(row)])[0]) for row in mine]
            weights = {label: float(w) for label, w in zip(labels, net.weight[j], strict=True)}
            found.append(Row(
                f"prototype {j}: {labels[classes[j]]}", [("decoded", picture), *nearest],
                {"nearest of so many pictures": used[j], "weights": weights},
            ))  # fmt: skip
        explained = []
        for row in asked[:SHOWN]:
            x = to_tensor([unseen.picture(row)])
            reasons, logits = net.explain(x)[0][:3], net(x)[0]
            decoded = in_colour(net.decode(net.features(x)))[0] * 2 - 1
            closest = [(f"{labels[classes[r.prototype]]}, {r.distance:.3g}", r.picture) for r in reasons]
            said = labels[int(logits.argmax())]
            explained.append(Row(
                f"{labels[unseen.label(row)]}, taken for {said}", [("picture", x[0]), ("decoded", decoded), *closest],
                {f"prototype {r.prototype} adds to {said}": float(r.contributions[logits.argmax()]) for r in reasons},
            ))  # fmt: skip
        told = {
            "of the class of the nearest training picture": f"{agree} of {len(classes)} prototypes",
            "never the nearest": sorted(set(range(len(classes))) - set(used)),
        }
        first = "Decoded, and the training pictures nearest to each, which a poor decoder cannot make up."
        then = "A picture, what the decoder makes of it, and the prototypes nearest to it with their squared distances."
        return Sheet("Prototypes", first, found, told=told), Sheet("Decisions", then, explained)
