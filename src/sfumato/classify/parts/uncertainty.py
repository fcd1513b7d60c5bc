"""How unsure a classifier is that samples its explanations: of its labels, and of the explanations themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TINY = 1e-8
"""Added inside of logarithms."""
MARGIN = 10.0
"""How far beyond 0 and the largest distance densities are integrated."""
AT_ONCE = 2**24
"""Kernels evaluated at a time."""


def entropy(p: Float[Tensor, "*n classes"]) -> Float[Tensor, "*n"]:
    """In nats."""
    return -(p * (p + TINY).log()).sum(-1)


def of_labels(p: Float[Tensor, "n samples classes"]) -> dict[str, Float[Tensor, "n"]]:
    """``total``, the entropy of the mean; ``aleatoric``, the mean entropy; ``epistemic``, what is between the two."""
    total, aleatoric = entropy(p.mean(1)), entropy(p).mean(1)
    return {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}


def densities(samples: Float[Tensor, "*n samples"], at: Float[Tensor, "*n points"]) -> Float[Tensor, "*n points"]:
    """A Gaussian kernel estimate of the density of ``samples``; the bandwidth is their n^(-1/5) deviations (Scott)."""
    n = samples.shape[-1]
    width = samples.std(-1, keepdim=True).unsqueeze(-1) * n ** (-1 / 5)
    z = (at.unsqueeze(-1) - samples.unsqueeze(-2)) / width
    return torch.exp(-0.5 * z.square()).mean(-1) / (width.squeeze(-1) * math.sqrt(2 * math.pi))


def overlap(
    d: Float[Tensor, "n classes samples"], predicted: Int[Tensor, "n"], cells: int = 1000
) -> Float[Tensor, "n"]:
    """How well another class explains a picture, too: 0 not at all, 1 equally well.

    The integral of the smaller of two densities, that of the distances to the predicted class and that of a rival's,
    by midpoints of ``cells`` cells from -10 to 10 beyond the rival's largest distance; the largest over all rivals.
    Where distances do not vary they overlap wholly or not at all. Cells that are wide beside the densities are inexact.
    """
    n, classes, samples = d.shape
    own = d.gather(1, predicted[:, None, None].expand(-1, 1, samples)).expand_as(d)
    top = d.amax(-1) + MARGIN
    step = (top + MARGIN) / cells
    middles = torch.arange(cells, dtype=d.dtype, device=d.device) + 0.5
    found = torch.empty(n, classes, dtype=d.dtype, device=d.device)
    rows = max(1, AT_ONCE // (classes * cells * samples))
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        at = middles * step[part, :, None] - MARGIN
        least = torch.minimum(densities(own[part], at), densities(d[part], at))
        found[part] = least.sum(-1) * step[part]
    still = (own.amax(-1) == own.amin(-1)) | (d.amax(-1) == d.amin(-1))
    found = torch.where(still, (own == d).all(-1).to(d), found)
    return found.scatter(1, predicted[:, None], -1.0).amax(1).clamp(0, 1)


def percentile(
    reference: Float[Tensor, "classes m"], distance: Float[Tensor, "n classes"], which: Int[Tensor, "n"]
) -> Float[Tensor, "n"]:
    """The share of known pictures of class ``which`` that are strictly nearer to its prototype; 1: none is as far.

    Args:
        reference: mean distances of training pictures of each class to its own prototype; negative ones stand for
            none, where a class has fewer.
        distance: mean distances of the pictures in question.
    """
    known = reference[which]
    there = known >= 0
    nearer = there & (known < distance.gather(1, which[:, None]))
    return nearer.sum(1) / there.sum(1).clamp(min=1)


def risk_coverage(
    uncertainty: Float[Tensor, "n"], right: Bool[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Selective prediction: the share of pictures that is answered, and the errors among these, the surest first."""
    wrong = (~right[uncertainty.argsort(stable=True)]).double()
    n = torch.arange(1, len(wrong) + 1, dtype=torch.float64, device=wrong.device)
    return n / len(wrong), wrong.cumsum(0) / n


def selective(unsure: Mapping[str, Float[Tensor, "n"]], right: Bool[Tensor, "n"]) -> dict[str, float]:
    """The area under the curve of `risk_coverage` for each kind of uncertainty: small where it knows its errors."""
    return {kind: float(risk_coverage(u, right)[1].mean()) for kind, u in unsure.items()}
