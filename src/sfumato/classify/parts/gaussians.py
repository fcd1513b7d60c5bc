"""Distributions in a latent space that prototypes are drawn from: Gaussians, and mixtures of them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

Family = Literal["gauss_diag", "gauss_full", "mix"]
SHIFT = 1e-5
"""Added to the diagonal of a full scale."""


def inverse_softplus(y: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """x with log(1 + exp(x)) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def scale_tril(raw: Float[Tensor, "*n entries"], dim: int) -> Float[Tensor, "*n dim dim"]:
    """A lower-triangular matrix with positive diagonal of any dim (dim + 1) / 2 numbers, or of dim a diagonal one.

    What is below the diagonal is as it is, row by row; the diagonal is its softplus, plus 1e-5. A diagonal alone is its
    softplus.
    """
    if raw.shape[-1] == dim:
        return torch.diag_embed(softplus(raw))
    rows, columns = torch.tril_indices(dim, dim, device=raw.device)
    values = torch.where(rows == columns, softplus(raw) + SHIFT, raw)
    made = raw.new_zeros(*raw.shape[:-1], dim, dim)
    made[..., rows, columns] = values
    return made


def raw_of(tril: Float[Tensor, "*n dim dim"], full: bool) -> Float[Tensor, "*n entries"]:
    """What `scale_tril` makes ``tril`` of; of its diagonal only, unless ``full``."""
    least = 1e-6
    diagonal = tril.diagonal(dim1=-2, dim2=-1)
    if not full:
        return inverse_softplus(diagonal.clamp(min=least))
    dim = tril.shape[-1]
    rows, columns = torch.tril_indices(dim, dim, device=tril.device)
    values = tril[..., rows, columns]
    return torch.where(rows == columns, inverse_softplus((values - SHIFT).clamp(min=least)), values)


def log_density(
    z: Float[Tensor, "n dim"], mean: Float[Tensor, "*m dim"], tril: Float[Tensor, "*m dim dim"]
) -> Float[Tensor, "n *m"]:
    """log N(z; mean, L L^T) of each latent under each Gaussian, by a triangular solve."""
    apart = (z.reshape(len(z), *[1] * (mean.ndim - 1), -1) - mean).movedim(0, -1)
    solved = torch.linalg.solve_triangular(tril, apart, upper=False).square().sum(-2).movedim(-1, 0)
    volume = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (solved + z.shape[1] * math.log(2 * math.pi)) - volume


def fitted(z: Float[Tensor, "n dim"], full: bool) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim dim"]]:
    """Mean and scale of latents: the factor of their covariance (divisor n - 1), or their deviations (divisor n)."""
    mean = z.mean(0)
    if not full:
        return mean, torch.diag(z.std(0, correction=0))
    covariance = z.T.cov()
    tril, failed = torch.linalg.cholesky_ex(covariance)
    # As many pictures as dimensions, or fewer, span no volume; rounding may let the factorisation pass all the same.
    if failed or len(z) <= z.shape[1]:
        more = max(1e-4 * float(covariance.diagonal().mean()), 1e-6)
        tril = torch.linalg.cholesky(covariance + more * torch.eye(len(mean)).to(covariance))
    return mean, tril


class Distributions(nn.Module):
    """``n`` distributions over ``dim`` dimensions, each one Gaussian or a mixture of ``components`` of them."""

    def __init__(self, n: int, dim: int, family: Family, components: int, prior_std: float = 1.0):
        """At the start by chance, as far apart as a prior of deviation ``prior_std``."""
        super().__init__()
        self.dim, self.full = dim, family != "gauss_diag"
        parts = components if family == "mix" else 1
        self.mean = nn.Parameter(prior_std * torch.randn(n, parts, dim))
        if family == "gauss_diag":
            raw = prior_std * (0.2 + 0.1 * torch.randn(n, parts, dim))
        else:
            spread = (0.3, 0.3) if family == "mix" else (0.2, 0.1)
            raw = spread[0] + spread[1] * torch.randn(n, parts, dim * (dim + 1) // 2)
        self.raw = nn.Parameter(raw)
        self.logits = nn.Parameter(1 + 0.2 * torch.randn(n, parts)) if parts > 1 else None

    @property
    def tril(self) -> Float[Tensor, "n parts dim dim"]:
        return scale_tril(self.raw, self.dim)

    def sample(self, samples: int, rng: torch.Generator) -> Float[Tensor, "samples n dim"]:
        """mean + L eps, through which gradients flow; through the choice of a mixture's part they do not."""
        n, _, dim = self.mean.shape
        eps = torch.randn(samples, n, dim, generator=rng).to(self.mean)
        if self.logits is None:
            return self.mean[:, 0] + torch.einsum("nij,snj->sni", self.tril[:, 0], eps)
        share = self.logits.detach().cpu().softmax(1)
        chosen = torch.multinomial(share, samples, replacement=True, generator=rng).T.to(self.mean.device)
        rows = torch.arange(n, device=self.mean.device)
        return self.mean[rows, chosen] + torch.einsum("snij,snj->sni", self.tril[rows, chosen], eps)

    def log_prob(self, z: Float[Tensor, "b dim"]) -> Float[Tensor, "b n"]:
        """Of each latent under each distribution."""
        found = log_density(z, self.mean, self.tril)
        return found[..., 0] if self.logits is None else (found + self.logits.log_softmax(1)).logsumexp(-1)

    def mode(self) -> Float[Tensor, "n dim"]:
        """The mean; of a mixture, the mean of its largest part."""
        if self.logits is None:
            return self.mean[:, 0]
        return self.mean[torch.arange(len(self.mean), device=self.mean.device), self.logits.argmax(1)]

    @torch.no_grad()
    def fit(self, z: Float[Tensor, "b dim"], y: Int[Tensor, "b"], classes: int, rng: torch.Generator) -> None:
        """Take mean and scale from the latents of each class; distribution j is of class j modulo ``classes``.

        Where a class has several distributions or parts, each is put on a latent of its own instead of the mean.
        """
        n, parts, _ = self.mean.shape
        for k in range(classes):
            own = z[y == k].double().cpu()
            mean, tril = fitted(own, self.full)
            mine = range(k, n, classes)
            several = len(mine) * parts > 1
            picked = own[torch.randperm(len(own), generator=rng)].repeat(-(-len(mine) * parts // len(own)), 1)
            for i, j in enumerate(mine):
                self.mean[j] = (picked[i * parts : (i + 1) * parts] if several else mean[None]).to(self.mean)
                self.raw[j] = raw_of(tril, self.full).to(self.raw)
