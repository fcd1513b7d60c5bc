"""SLA: one classifier over pairs of class and transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, Share

from .base import Classifier
from .parts.augmented import Augmented, Mode, Objective
from .parts.backbone import Backbone
from .parts.copies import (
    FAMILIES,
    aggregated,
    augmentation_loss,
    distillation_loss,
    expanded,
    family,
    joint_loss,
    multitask_loss,
    prototype_logits,
    single,
)
from .parts.data import measured
from .parts.rules import Rule

__all__ = [
    "FAMILIES", "SLA", "Augmented", "aggregated", "augmentation_loss", "distillation_loss", "expanded", "family",
    "joint_loss", "multitask_loss", "prototype_logits", "single",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SLA(Classifier):
    """Labels are pairs of a class and a transformation; one head tells both at once.

    arXiv:1910.05872. "sla" learns the joint labels of the m transformed copies of each picture, and answers from the
    picture as it is or from the mean of the copies' logits, each of its own slice. "sla+sd" teaches that mean to a
    second head, which then answers from one copy: L_SLA + T^2 KL + beta CE. The baselines: "da", every copy has the
    picture's label; "mt", and a head tells the transformation; "plain", no copies. These answer in the mode "aggregate"
    as usual at test time, by the mean of one head's logits over copies. Copies are made after shifts and mirrors, so
    that ``accumulate`` keeps those of a picture together. Cost: m times that of the network.

    Differs from the paper: "sgd" is Nesterov's momentum, and weight decay spares biases and batch normalisation; a
    shift repeats the border; rows are drawn with replacement; the last weights are kept. ResNet-18 for larger pictures
    is asked for by name. Of the joint-label few-shot and imbalanced classifiers there is only `prototype_logits`.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {**Classifier.EXAMPLE, "backbone": "resnet", "widths": (8, 16), "lr": 0.01}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "large-pictures": {"size": 224, "backbone": "timm:resnet18", "total": True, "rate_falls": (1 / 3, 2 / 3)},
        "small-run": {
            "update_rule": "adamw", "lr": 3e-3, "weight_decay": 0.05, "rate_falls": (), "updates": 1000, "batch": 32,
            "warmup": 50, "clip_norm": 1.0, "backbone": "resnet",
        },
    }  # fmt: skip
    """``large-pictures``: the authors' losses and rate for ImageNet. ``small-run``: for a CPU, untuned."""

    backbone: str = "resnet32"
    """"resnet20", "resnet32", ...: for pictures of 32 pixels; or what else classify plain takes."""
    widths: tuple[Count, ...] = (48, 96, 160, 256)
    """Channels of the levels of "resnet"."""
    objective: Objective = "sla+sd"
    """What is learned."""
    transformations: Literal[
        "rotation", "rotation2", "colour", "colour3", "rotation2-colour3", "rotation-colour3", "rotation-colour"
    ] = "rotation"
    """The copies: quarter turns or half turns; all six orders of the channels, or the cyclic three; or both together,
    6, 12 and 24 copies."""
    mode: Mode | None = None
    """How it answers: "single", "aggregate" or "distilled"; by default "distilled" of "sla+sd", "aggregate" of "sla",
    "single" of the others."""
    temperature: Positive = 1.0
    """T of the distillation."""
    student_weight: NotNegative = 1.0
    """beta, of the second head's own cross-entropy."""
    total: bool = False
    """Sum the joint loss over copies, where the paper takes their mean; the authors' way for large sets."""
    rate_falls: tuple[Share, ...] = (0.5, 0.75)
    """Shares of the run after which the learning rate falls to ``rate_factor`` of what it was; none: as ``decay``
    says."""
    rate_factor: Share = 0.1
    """What the learning rate is then multiplied by."""
    size: Count = 32
    flip: bool = True
    label_smoothing: Decay = 0.0
    update_rule: Rule = "sgd"
    lr: Positive = 0.1
    weight_decay: NotNegative = 1e-4
    batch: Count = 128
    """Pictures in an update, each with all its copies."""
    updates: Natural = 80_000
    warmup: Natural = 0
    clip_norm: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "distilled" and self.objective != "sla+sd":
            raise BadInput(f"{self.objective} has no distilled head: choose sla+sd, or another mode")

    def network(self, labels: tuple[str, ...]) -> nn.Module:
        backbone = Backbone(self.backbone, self.size, self.widths)
        return Augmented(
            backbone, backbone.width, len(labels), family(self.transformations), self.objective, self.mode
        )  # fmt: skip

    def loss(
        self, net: nn.Module, x: Float[Tensor, "batch 3 size size"], y: Int[Tensor, "batch"], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        m, smooth = net.m, self.label_smoothing
        right = lambda z: (z.detach().argmax(1) == y).float().mean()
        if self.objective == "plain":
            z = net.labels(net.features(x)).float()
            return cross_entropy(z, y, label_smoothing=smooth), {"right": right(z)}
        features = net.features(expanded(x, net.transformations))
        if net.joint is None:
            z = net.labels(features).float()
            told = {"right": right(z[::m])}
            if net.which is None:
                return augmentation_loss(z, y, m, smooth), told
            return multitask_loss(z, net.which(features).float(), y, smooth), told
        z = net.joint(features).float()
        mean, loss = aggregated(z, m), joint_loss(z, y, m, self.total, smooth)
        told = {"right": right(single(z[::m], m)), "right_aggregated": right(mean)}
        if net.labels is None:
            return loss, told
        student = net.labels(features[::m]).float()
        taught = distillation_loss(student, mean, y, self.temperature, self.student_weight, smooth)
        return loss + taught, told | {"right_distilled": right(student), "taught": taught.detach()}

    def rate(self) -> Callable[[int], float] | None:
        if not self.rate_falls:
            return None
        falls = [int(share * self.updates) for share in self.rate_falls]
        return lambda step: self.lr * self.rate_factor ** sum(step >= fall for fall in falls)

    def figures(self, net: nn.Module, pictures: Pictures) -> dict[str, Any]:
        """Beside the usual ones, top-1 accuracy by every mode, and of the joint labels of all copies."""
        found, mode = super().figures(net, pictures), net.mode
        for other in net.modes:
            net.mode = other
            found[other] = measured(net, pictures, self.batch, self.seed)["top1"]
        net.mode = mode
        if net.joint is not None:
            found["total"] = self._total(net, pictures)
        return found

    @torch.no_grad()
    def _total(self, net: nn.Module, pictures: Pictures) -> float:
        device, right = next(net.parameters()).device, 0
        for first in range(0, len(pictures), self.batch):
            rows = range(first, min(first + self.batch, len(pictures)))
            x = to_tensor([pictures.picture(row) for row in rows]).to(device)
            y = torch.tensor([pictures.label(row) for row in rows], device=device)
            told = net.joint(net.features(expanded(x, net.transformations))).argmax(1).unflatten(0, (-1, net.m))
            right += int((told == y[:, None] * net.m + torch.arange(net.m, device=device)).sum())
        return right / (len(pictures) * net.m)
