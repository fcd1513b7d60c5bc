"""Geodesics of the pulled-back metric: shooting, directions that samples share, the shell of data, curvedness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .geometry import Basis, Map, geodesic_distance, projected, pulled, transported, unit

Pool = Literal["sum", "avg2", "none"]
Carry = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def pooled(h: Float[Tensor, "row *features"], pool: Pool) -> Float[Tensor, "row *pooled"]:
    """Features summed over space ("sum"), averaged over squares of 2 x 2 ("avg2"), or as they are ("none").

    Of a network of tokens (row, token, width) "sum" is over the tokens.

    Raises:
        BadInput: "avg2" of features that are no map.
    """
    if pool == "none":
        return h
    if pool == "sum":
        return h.flatten(2).sum(2) if h.ndim == 4 else h.sum(1)
    if h.ndim != 4:
        raise BadInput('these features are no map of rows and columns: use pool "sum" or "none"')
    return F.avg_pool2d(h, 2)


def shoot(
    x: Float[Tensor, "*dims"],
    u: Float[Tensor, "*features"],
    v: Float[Tensor, "*dims"],
    gamma: float,
    moves: int,
    carry: Carry,
) -> list[Float[Tensor, "*dims"]]:
    """x <- x + gamma v, then (u, v) carried to the new point, so many times; all points, the first included.

    Section 3.2 of arXiv:2302.12469. A negative ``gamma`` goes the other way.

    Args:
        carry: of a point and the direction in the features there: both directions at the point, of unit length.
    """
    points = [x]
    for k in range(moves):
        points.append(points[-1] + gamma * v)
        if k + 1 < moves:
            u, v = carry(points[-1], u)
    return points


def by_gradient(f: Map, x: Float[Tensor, "*dims"], u: Float[Tensor, "*features"]) -> tuple[Tensor, Tensor]:
    """u as it is, and v = J^T u, the gradient of <u, f(x)>, of unit length: one backward pass, no basis.

    It weights the components of u by the singular values, V S U^T u.
    """
    return u, unit(pulled(f, x, u[None])[0])


def by_basis(basis: Basis, u: Float[Tensor, "*features"], flat: bool = False) -> tuple[Tensor, Tensor]:
    """u projected onto the tangent space, U U^T u, and v = V S^-1 U^T u, which J takes to it; both of unit length.

    With ``flat`` V U^T u, without the singular values.
    """
    u = projected(u, basis)
    return u, transported(u, basis, pinv=not flat)


def shared_directions(
    u: Sequence[Float[Tensor, "rank *features"]],
) -> tuple[Float[Tensor, "rank *features"], Float[Tensor, "rank"]]:
    """Global directions: for each of the first sample's, the mean of what is nearest to it in every other sample.

    Nearest by |cosine|, turned to its side, averaged over the samples (the first included) and made of unit length.
    With them the mean |cosine| of the partners to it (1 where there is one sample only).
    """
    reference = u[0].flatten(1)
    total, agreement = reference.clone(), []
    for other in u[1:]:
        cosines = reference @ other.flatten(1).T
        best, at = cosines.abs().max(dim=1)
        signs = cosines.gather(1, at[:, None]).sign()
        total = total + signs * other.flatten(1)[at]
        agreement.append(best)
    mean = total / total.norm(dim=1, keepdim=True)
    alike = torch.stack(agreement).mean(0) if agreement else torch.ones_like(reference[:, 0])
    return mean.view_as(u[0]), alike


def matched(
    x0: Float[Tensor, "channel height width"], like: Float[Tensor, "channel height width"], per_channel: bool = False
) -> Float[Tensor, "channel height width"]:
    """``x0`` shifted and scaled to the mean and the standard deviation of ``like``, of all elements or by channel.

    What is the same everywhere, but for rounding, has no deviation to scale: it is shifted only.
    """
    dims = (-2, -1) if per_channel else (-3, -2, -1)
    spread = x0.std(dims, keepdim=True)
    known = spread > torch.finfo(x0.dtype).eps * x0.abs().amax(dims, keepdim=True)
    scale = torch.where(known, like.std(dims, keepdim=True) / spread, 1.0)
    return x0 * scale + (like.mean(dims, keepdim=True) - x0.mean(dims, keepdim=True) * scale)


def normalised(
    x: Float[Tensor, "channel height width"],
    moved: Float[Tensor, "channel height width"],
    predict: Callable[[Float[Tensor, "row channel height width"]], Float[Tensor, "row channel height width"]],
    alpha: float,
    sigma: float,
    kappa: float = 0.99,
    per_channel: bool = False,
) -> Float[Tensor, "channel height width"]:
    """The edited latent with the contrast that shifting it has cost (section 3.4 of arXiv:2302.12469).

    With P the prediction of x0: x0' = P(moved), matched to P(x) in mean and standard deviation; and the latent that has
    it, to first order, x + alpha / (1 - kappa sigma) (x0' - P(x)). ``kappa`` stands for the eigenvalue of d eps / dx
    along the edit: where eps is linear with kappa times the identity, P of the result is x0' exactly.

    Args:
        predict: P, for rows.
        alpha, sigma: of the noise process at this time.
    """
    # One by one, so that equal latents give equal bits.
    before, after = predict(x[None])[0], predict(moved[None])[0]
    target = matched(after, before, per_channel)
    return x + alpha / (1 - kappa * sigma) * (target - before)


def lerp(a: Float[Tensor, "*dims"], b: Float[Tensor, "*dims"], points: int) -> list[Float[Tensor, "*dims"]]:
    """The straight way from a to b, at equal distances."""
    return [a + (b - a) * (i / (points - 1)) for i in range(points)]


def slerp(a: Float[Tensor, "*dims"], b: Float[Tensor, "*dims"], points: int) -> list[Float[Tensor, "*dims"]]:
    """The way from a to b along the great circle, at equal angles; the length goes from one's to the other's."""
    cosine = (unit(a) * unit(b)).sum().clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-6:
        return lerp(a, b, points)
    made = []
    for i in range(points):
        s = i / (points - 1)
        made.append((((1 - s) * angle).sin() * a + (s * angle).sin() * b) / angle.sin())
    return made


def path_length(spaces: Sequence[Float[Tensor, "rank *features"]]) -> list[float]:
    """The distance of the tangent spaces at the ends of each segment of a path; their sum is its curvedness."""
    return [float(geodesic_distance(a, b)) for a, b in pairwise(spaces)]
