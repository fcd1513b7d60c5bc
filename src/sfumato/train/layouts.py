"""How layouts are learned: the losses of boxes and classes, and the optimisers of pictures from scene graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

SMALL = 1e-7


def complete_iou(predicted: Float[Tensor, "*dims 4"], due: Float[Tensor, "*dims 4"]) -> Float[Tensor, "*dims"]:
    """CIoU (arXiv:1911.08287): 1 - IoU + rho^2 / c^2 + alpha v, of boxes left, top, right, bottom.

    rho is the distance of the middles, c the diagonal of the box around both, v = 4 / pi^2 (atan(w* / h*) -
    atan(w / h))^2, and alpha = v / (1 - IoU + v), through which no gradient goes. 1e-7 is added to the union, to c^2
    and to alpha's denominator, and stands in for a height of 0.
    """
    corner = torch.maximum(predicted[..., :2], due[..., :2]), torch.minimum(predicted[..., 2:], due[..., 2:])
    around = torch.minimum(predicted[..., :2], due[..., :2]), torch.maximum(predicted[..., 2:], due[..., 2:])
    sides = [box[..., 2:] - box[..., :2] for box in (predicted, due)]
    both = (corner[1] - corner[0]).clamp(min=0).prod(-1)
    iou = both / (sides[0].prod(-1) + sides[1].prod(-1) - both + SMALL)
    middles = [(box[..., :2] + box[..., 2:]) / 2 for box in (predicted, due)]
    distance = (middles[0] - middles[1]).square().sum(-1)
    diagonal = (around[1] - around[0]).square().sum(-1) + SMALL
    w, h = ([side[..., i] for side in sides] for i in (0, 1))
    angle, angle_due = (torch.atan(a / torch.where(b == 0, SMALL, b)) for a, b in zip(w, h, strict=True))
    v = 4 / math.pi**2 * (angle_due - angle).square()
    with torch.no_grad():
        alpha = v / (1 - iou + v + SMALL)
    return 1 - iou + distance / diagonal + alpha * v


def layout_loss(
    boxes: Float[Tensor, "node 4"],
    logits: Float[Tensor, "node objects"],
    due: Float[Tensor, "node 4"],
    labels: Int[Tensor, "node"],
    stage: Literal[1, 2] = 1,
    box_weight: float = 10.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar loss of a layout, and its parts.

    Stage 1: squared error of boxes held to [0, 1], their `complete_iou` and cross-entropy of classes. Stage 2:
    ``box_weight`` times the absolute error of boxes as they are, and the same two.
    """
    boxes, logits = boxes.float(), logits.float()
    if stage == 1:
        boxes = boxes.clamp(0, 1)
    error = F.mse_loss(boxes, due) if stage == 1 else box_weight * F.l1_loss(boxes, due)
    parts = {"box": error, "iou": complete_iou(boxes, due).mean(), "label": F.cross_entropy(logits, labels)}
    return torch.stack(list(parts.values())).sum(), {name: x.detach() for name, x in parts.items()}


def one_cycle(step: int, updates: int, highest: float, up: float = 0.3) -> float:
    """The rate at update ``step`` of torch's OneCycleLR with its defaults: from 1 / 25 of ``highest`` up in a cosine in
    the share ``up`` of the updates, then down to 1 / 250 000 of it."""
    first, last = highest / 25, highest / 25 / 1e4
    peak, end = up * updates - 1, updates - 1
    rising = step <= peak
    low, high, past = (first, highest, step / peak if peak else 1.0) if rising else (highest, last, 1.0)
    if not rising:
        past = (step - peak) / (end - peak)
    return high + (low - high) / 2 * (1 + math.cos(math.pi * past))


def decayed(names: set[str], network: nn.Module, weight_decay: float) -> Callable[..., torch.optim.Optimizer]:
    """AdamW(0.9, 0.95) for all parameters of a network, with weight decay for those called ``names`` alone."""

    def make(weights: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        named = [name for name, p in network.named_parameters() if p.requires_grad]
        groups = [
            {"params": [w], "weight_decay": weight_decay if name in names else 0.0}
            for name, w in zip(named, weights, strict=True)
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

    return make
