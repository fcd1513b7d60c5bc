"""Heads for classes, for transformations and for pairs of both, on one backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .copies import Transformation, aggregated, expanded, single

Objective = Literal["sla+sd", "sla", "da", "mt", "plain"]
Mode = Literal["single", "aggregate", "distilled"]


class Augmented(nn.Module):
    """Heads on one backbone, and the ways to ask them.

    Args:
        backbone: from pictures to ``width`` features.
        classes: how many.
        transformations: the identity first.
        objective: which heads there are.
        mode: what a call answers; ``net.mode`` may be changed at any time, to one of ``net.modes``.

    Raises:
        BadInput: the first transformation changes pictures; ``mode`` is not one that there is.
    """

    def __init__(
        self, backbone: nn.Module, width: int, classes: int, transformations: Sequence[Transformation],
        objective: Objective = "sla+sd", mode: Mode | None = None,
    ):  # fmt: skip
        super().__init__()
        probe = torch.arange(27.0).reshape(1, 3, 3, 3)
        if not torch.equal(transformations[0](probe), probe):
            raise BadInput("the first transformation changes pictures: let the identity be the first")
        self.features, self.transformations, self.m = backbone, tuple(transformations), len(transformations)
        joint = objective in ("sla", "sla+sd")
        self.joint = nn.Linear(width, classes * self.m) if joint else None
        self.labels = nn.Linear(width, classes) if objective != "sla" else None
        self.which = nn.Linear(width, self.m) if objective == "mt" else None
        self.modes: tuple[Mode, ...] = ("single", "aggregate")
        self.modes += ("distilled",) if objective == "sla+sd" else ()
        self.mode: Mode = mode or {"sla+sd": "distilled", "sla": "aggregate"}.get(objective, "single")
        if self.mode not in self.modes:
            raise BadInput(f"{objective} has no {self.mode} head: ask for {' or '.join(self.modes)}")

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        if self.mode == "aggregate":
            copies = self.features(expanded(x, self.transformations))
            if self.joint is None:  # what is usual at test time: the same head for all copies
                assert self.labels is not None
                return self.labels(copies).unflatten(0, (-1, self.m)).mean(1)
            return aggregated(self.joint(copies), self.m)
        return self.from_features(self.features(x))

    def from_features(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Logits of the features of pictures; of these alone, also where a call asks transformed copies, too."""
        if self.joint is not None and self.mode != "distilled":
            return single(self.joint(features), self.m)
        assert self.labels is not None
        return self.labels(features)
