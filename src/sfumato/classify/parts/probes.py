"""What a linear classifier can read from frozen features, on average and in the worst group."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sfumato.errors import BadInput


def linear_probe(
    z: Float[Tensor, "n d"], y: Int[Tensor, "n"], classes: int, decay: float = 1e-3, steps: int = 200
) -> tuple[Float[Tensor, "classes d"], Float[Tensor, "classes"]]:
    """Weights and biases of a logistic regression on standardised features, for features as they are.

    Minimises the mean cross-entropy plus ``decay`` / 2 times the squared weights, in float64 by L-BFGS. Without the
    standardising, ``decay`` would favour large features.
    """
    z, y = z.detach().double(), y.to(z.device)
    mean, spread = z.mean(0), z.std(0, correction=0)
    scale = torch.where(spread > 1e-12, 1 / spread.clamp(min=1e-12), 0.0)
    x = (z - mean) * scale
    weight = torch.zeros(classes, z.shape[1], dtype=z.dtype, device=z.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=z.dtype, device=z.device, requires_grad=True)
    rule = torch.optim.LBFGS([weight, bias], max_iter=steps, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        rule.zero_grad()
        value = cross_entropy(x @ weight.T + bias, y) + 0.5 * decay * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        rule.step(loss)
    w = weight.detach() * scale
    return w, bias.detach() - w @ mean


def balanced(groups: Int[Tensor, "n"], rng: torch.Generator) -> Int[Tensor, "m"]:
    """Rows in which every group has as many as the smallest: for retraining a last layer (DFR, arXiv:2204.02937).

    Raises:
        BadInput: a group below the largest number has no rows.
    """
    counts = groups.bincount()
    if (counts == 0).any():
        raise BadInput(f"group {int((counts == 0).nonzero()[0])} has no pictures: number groups without gaps")
    order = torch.randperm(len(groups), generator=rng)
    ranked = groups.cpu()[order]
    kept = [order[ranked == g][: int(counts.min())] for g in range(len(counts))]
    return torch.cat(kept).sort().values


def by_group(right: Bool[Tensor, "n"], groups: Int[Tensor, "n"]) -> tuple[float, float]:
    """The share that is right: of all rows, and of the group where it is lowest."""
    each = [float(right[groups == g].double().mean()) for g in groups.unique()]
    return float(right.double().mean()), min(each)


def spectrum(z: Float[Tensor, "n d"]) -> Float[Tensor, "d"]:
    """Singular values of the covariance of features, the largest first."""
    return torch.linalg.svdvals(z.double().T.cov().reshape(z.shape[1], z.shape[1]))


def effective_rank(values: Float[Tensor, "d"]) -> float:
    """The exponential of the entropy of singular values as shares of their sum (Roy and Vetterli 2007)."""
    share = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))
