"""Projection head: a representation trained through a head that is thrown away, judged before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, at_least
from sfumato.metrics.bootstrap import rate_interval
from sfumato.train import draw

from .base import Classifier, Labelling
from .parts.contrastive import info_nce, spectral, sup_con
from .parts.heads import HeadKind, Reweight, make_head
from .parts.networks import by_name
from .parts.probes import balanced, by_group, effective_rank, linear_probe, spectrum
from .parts.prototypes import LOOKED_AT, some
from .parts.sheet import Figure, Row, Sheet

SHOWN = 6
"""Pictures whose neighbours are shown, and how many of these."""


class Net(nn.Module):
    """An encoder, a head that only training looks through, and a linear classifier on what the encoder gives."""

    def __init__(self, encoder: Any, size: int, classes: int, pretext: int, head: HeadKind, hidden: int, kappa: float,
                 span: float):  # fmt: skip
        """``pretext``: classes of a classifier after the head; 0: none."""
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            dim = encoder.eval().features(torch.zeros(1, 3, size, size)).shape[1]
        encoder.train()
        kappa = span ** (1 / max(1, dim - 1)) if span else kappa
        self.head = make_head(head, dim, hidden or dim, kappa)
        self.pretext = nn.Linear(dim, pretext) if pretext else None
        self.probe = nn.Linear(dim, classes).requires_grad_(False)

    def features(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n d"]:
        """z, before the head."""
        return self.encoder.features(x)

    def projected(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n d"]:
        """h, after it."""
        return self.head(self.features(x))

    def from_features(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Logits of these features."""
        return self.probe(features)

    def forward(self, x: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n classes"]:
        return self.from_features(self.features(x))


@dataclass(frozen=True, kw_only=True)
class ProjectionHead(Classifier):
    """Trains an encoder through a projection head, throws the head away, and classifies by a linear probe.

    arXiv:2403.11391. The loss sees h = head(z), and features that the task of pre-training does not ask for, or that
    augmentations disturb, are weaker in h than in z: with linear layers by the square, feature by feature
    (`sfumato.classify.parts.laboratory` has the closed forms), and with others some are in z only. Heads: none, linear,
    with one or two hidden layers, the paper's fixed weights kappa^-i, and an identity with a symmetric ReLU. The page
    holds probes before and after the head against each other, on average and for the worst class, with last layers
    retrained in balance too, and shows spectra and neighbours. Cost: a forward and a backward pass of the network for
    each view, and a logistic regression at the end.

    Differs from the paper: probes are by L-BFGS on standardised features, so that behind fixed weights they find what
    is before them, too. Contrastive losses compare the rows of a micro-batch on one process. Unconfirmed: kappa, which
    is the released code's; augmentations are this project's. The laboratory is our own derivation.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {**Classifier.EXAMPLE, "widths": (8, 16)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "waterbirds": {
            "objective": "sup-con", "head": "reweight", "kappa": 1.05, "update_rule": "sgd", "lr": 1e-3,
            "momentum": 0.9, "weight_decay": 1e-3, "batch": 32, "decay": "constant", "warmup": 0, "clip_norm": 0.0,
        },
        "imagenet": {
            "objective": "cross-entropy", "head": "mlp", "hidden": 2048, "update_rule": "sgd", "lr": 0.1,
            "momentum": 0.9, "weight_decay": 1e-4, "batch": 256, "backbone": "transformers:resnet", "size": 224,
        },
    }  # fmt: skip
    """Optimisers and heads of the released code, for spurious features and for ImageNet; data are yours to give."""

    backbone: str = "resnet"
    """The encoder, as of `Plain`: "resnet", "timm:NAME", "transformers:TYPE" or "transformers:FOLDER"."""
    widths: tuple[Count, ...] = (48, 96, 160, 256)
    """Channels of the levels of "resnet"."""
    head: HeadKind = "mlp"
    """None; linear; one hidden layer ("mlp") or two; fixed weights ("reweight"); or two layers that start as the
    identity with a symmetric ReLU between, whose threshold is learned from 0."""
    hidden: Natural = 0
    """Units in the hidden layers of "mlp" and "mlp2"; 0: as many as the representation has."""
    kappa: Annotated[float, at_least(1)] = 1.05
    """Of "reweight": coordinate i is divided by this to the i; 1: no head. At 2048 coordinates 1.05 leaves 284 above a
    millionth."""
    span: Annotated[float, at_least(0)] = 0.0
    """Of "reweight": the ratio of the largest weight to the smallest, from which kappa follows at any width; 0: as
    kappa says."""
    objective: Literal["info-nce", "spectral", "sup-con", "cross-entropy"] = "sup-con"
    """What is trained: SimCLR's loss, the spectral contrastive one, both without labels; supervised contrast; or a
    linear classifier after the head."""
    temperature: Positive = 0.5
    """Of "info-nce" and "sup-con"."""
    groups: Natural = 0
    """Train with so many groups of neighbouring classes for labels; the probe asks for the classes. 0: with these."""
    probe_pictures: Count = 5000
    """Training pictures, at most, that the probe is fitted to."""
    probe_decay: NotNegative = 1e-3
    """Its weight decay."""
    label_smoothing: Decay = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span and self.span < 1:
            raise BadInput(f"span is the ratio of the largest weight to the smallest, at least 1, got {self.span}")
        if self.objective != "cross-entropy":
            self.require_several(f"{self.objective} compares different pictures")

    def network(self, labels: tuple[str, ...]) -> Net:
        """A fresh network.

        Raises:
            BadInput: more groups than classes, or one; as `by_name`.
        """
        if self.groups and not 2 <= self.groups <= len(labels):
            raise BadInput(
                f"{len(labels)} classes cannot be put into {self.groups} groups: give from 2 to {len(labels)}"
            )
        pretext = (self.groups or len(labels)) if self.objective == "cross-entropy" else 0
        encoder = by_name(self.backbone, labels, self.size, self.widths)
        return Net(encoder, self.size, len(labels), pretext, self.head, self.hidden, self.kappa, self.span)

    def recipe(self, net: nn.Module, pictures: Pictures) -> Labelling:
        return Pretraining(self, net, pictures)

    def loss(
        self, net: nn.Module, x: Float[Tensor, "rows 3 size size"], y: Int[Tensor, "batch"], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``x`` holds one view of each picture, or two, all the first before all the second."""
        assert isinstance(net, Net)
        h = net.projected(x).float()
        if net.pretext is not None:
            return cross_entropy(net.pretext(h), y, label_smoothing=self.label_smoothing), {}
        if self.objective == "sup-con":
            return sup_con(h, y.repeat(len(h) // len(y)), self.temperature), {}
        first, second = h.chunk(2)
        if self.objective == "spectral":
            return spectral(first, second), {}
        return info_nce(first, second, self.temperature), {}

    def settle(self, net: nn.Module, pictures: Pictures) -> None:
        """Fit the probe to the representation of training pictures."""
        assert isinstance(net, Net)
        z, _, y = represented(net, pictures, some(pictures, self.probe_pictures, self.seed), self.batch)
        weight, bias = linear_probe(z, y, len(pictures.label_names), self.probe_decay)
        with torch.no_grad():
            net.probe.weight.copy_(weight)
            net.probe.bias.copy_(bias)

    def sheets(self, folder: str | Path) -> tuple[Sheet, ...]:
        """Probes, spectra and neighbours before the head and after it."""
        net, (seen, unseen, _) = self.read(folder), self.parts()
        assert isinstance(net, Net)
        rows = some(seen, self.probe_pictures, self.seed)
        asked = some(unseen, LOOKED_AT, self.seed)
        *known, y = represented(net, seen, rows, self.batch)
        *new, truth = represented(net, unseen, asked, self.batch)
        classes, rng = len(seen.label_names), torch.Generator().manual_seed(self.seed)
        told: dict[str, Any] = {"head": self.head}
        if isinstance(net.head, Reweight):
            told["coordinates that the head carries"] = f"{net.head.carried} of {len(net.head.weights)}"
        even, lines = balanced(y, rng), {}
        for name, z, x in zip(("before the head", "after the head"), known, new, strict=True):
            right = probed(z, y, x, classes, self.probe_decay).argmax(1) == truth
            fair = probed(z[even], y[even], x, classes, self.probe_decay).argmax(1) == truth
            rate, values = rate_interval(right, rng), spectrum(z)
            told[name] = {
                "right": rate.value, "interval": [rate.low, rate.high], "worst class": by_group(right, truth)[1],
                "worst class, retrained in balance": by_group(fair, truth)[1], "effective rank": effective_rank(values),
            }  # fmt: skip
            shares = (values / values[0]).clamp(min=1e-8).log10()
            lines[name] = [(float(i), float(share)) for i, share in enumerate(shares)]
        first = Sheet(
            "Before the head and after it", "Linear probes for the classes, of unseen pictures.",
            figures=[Figure("log10 of singular values, as shares of the largest", "number", lines)], told=told,
        )  # fmt: skip
        found = []
        for i, row in enumerate(asked[:SHOWN]):
            pictures = [("picture", to_tensor([unseen.picture(row)])[0])]
            for name, z, x in zip(("before", "after"), known, new, strict=True):
                near = (z - x[i]).norm(dim=1).argsort()[:3].tolist()
                labels = [seen.label_names[seen.label(rows[j])] for j in near]
                pictures += [
                    (f"{name}: {label}", to_tensor([seen.picture(rows[j])])[0])
                    for label, j in zip(labels, near, strict=True)
                ]
            found.append(Row(unseen.label_names[unseen.label(row)], pictures))
        about = "Unseen pictures with the training pictures that are nearest to them in each representation."
        return first, Sheet("Neighbours", about, found)


class Pretraining(Labelling):
    """Views of pictures, and the labels that the training is told; the probe is fitted later."""

    method: ProjectionHead
    partial = True

    def batch(self, step: int, rng: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        rows = draw.integers(len(self.pictures), size, rng).tolist()
        x = to_tensor([self.pictures.picture(row) for row in rows])
        views = 1 if self.method.objective == "cross-entropy" else 2
        y = torch.tensor([self.pictures.label(row) for row in rows])
        if self.method.groups:
            y = grouped(y, len(self.pictures.label_names), self.method.groups)
        return torch.cat([self.method.augmented(x, rng) for _ in range(views)]), y


def grouped(y: Int[Tensor, "n"], classes: int, groups: int) -> Int[Tensor, "n"]:
    """The group of each class, neighbours together and groups as even as can be."""
    return y * groups // classes


@torch.no_grad()
def represented(
    net: Net, pictures: Pictures, rows: list[int], batch: int
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Int[Tensor, "n"]]:
    """z, h and labels of these rows, on the CPU."""
    device, found = next(net.parameters()).device, []
    for first in range(0, len(rows), batch):
        x = to_tensor([pictures.picture(row) for row in rows[first : first + batch]])
        found.append(net.features(x.to(device)).float())
    z = torch.cat(found)
    return z.cpu(), net.head(z).cpu(), torch.tensor([pictures.label(row) for row in rows])


def probed(
    z: Float[Tensor, "n d"], y: Int[Tensor, "n"], x: Float[Tensor, "m d"], classes: int, decay: float
) -> Float[Tensor, "m classes"]:
    """Logits for ``x`` of a probe that was fitted to ``z``."""
    weight, bias = linear_probe(z, y, classes, decay)
    return x.double() @ weight.T + bias
