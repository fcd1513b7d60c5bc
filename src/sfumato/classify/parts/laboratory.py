"""The laboratory of projection heads: linear nets whose minimum is known, feature by feature.

Data are x = sum_i u_i phi_i v_i + noise with signs u_i, orthonormal v_i, strengths phi_i and noise of variance s^2 in
every direction. An augmentation flips feature i with the probability alpha_i and draws the noise anew. A derivation of
our own, in agreement with what arXiv:2403.11391 claims.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .heads import symmetric_relu


def moments(
    strength: Float[Tensor, "p"],
    flips: Float[Tensor, "p"],
    noise: float,
    directions: Float[Tensor, "d p"] | None = None,
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """Sigma = E[x+ x+^T] of views, and M = E[xbar xbar^T] of the mean view of a picture."""
    v = torch.eye(len(strength)).to(strength) if directions is None else directions
    sigma = v @ torch.diag(strength.square()) @ v.T + noise**2 * torch.eye(len(v)).to(v)
    return sigma, v @ torch.diag(((1 - 2 * flips) * strength).square()) @ v.T


def risk(w: Float[Tensor, "q d"], sigma: Float[Tensor, "d d"], m: Float[Tensor, "d d"]) -> Float[Tensor, ""]:
    """The spectral contrastive loss of h = W x: -2 tr(G M) + tr(G Sigma G Sigma), G = W^T W."""
    g = w.T @ w
    return -2 * (g @ m).trace() + (g @ sigma @ g @ sigma).trace()


def risk_gradient(
    w: Float[Tensor, "q d"], sigma: Float[Tensor, "d d"], m: Float[Tensor, "d d"]
) -> Float[Tensor, "q d"]:
    """-4 W M + 4 W Sigma G Sigma."""
    return 4 * w @ (sigma @ w.T @ w @ sigma - m)


def best_gram(sigma: Float[Tensor, "d d"], m: Float[Tensor, "d d"], width: int | None = None) -> Float[Tensor, "d d"]:
    """G* = Sigma^-1 M Sigma^-1, on Sigma's range; of a narrower W the ``width`` largest directions of
    Sigma^-1/2 M Sigma^-1/2."""
    values, vectors = torch.linalg.eigh(sigma)
    there = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = vectors @ torch.diag(torch.where(there, values.clamp(min=1e-300).rsqrt(), 0.0)) @ vectors.T
    gains, axes = torch.linalg.eigh(root @ m @ root)
    kept = len(gains) if width is None else width
    g = root @ axes[:, -kept:]
    return g @ torch.diag(gains[-kept:].clamp(min=0)) @ g.T


def balanced_start(dim: int, layers: int, scale: float, rng: torch.Generator) -> list[Float[Tensor, "dim dim"]]:
    """Layers whose Gram matrices agree: a rotation and identities, times ``scale``."""
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64)).Q
    return [scale * rotation, *[scale * torch.eye(dim, dtype=torch.float64) for _ in range(layers - 1)]]


@torch.no_grad()
def descend(
    layers: Sequence[Float[Tensor, "a b"]], sigma: Float[Tensor, "d d"], m: Float[Tensor, "d d"], lr: float, steps: int
) -> list[Float[Tensor, "a b"]]:
    """Gradient descent on `risk` of the product of ``layers``, the first the nearest to the data.

    Starts near 0 do not move for about 1 / scale^2 steps: the origin is a saddle.
    """
    layers = [layer.clone() for layer in layers]
    for _ in range(steps):
        below = [torch.eye(layers[0].shape[1]).to(sigma)]
        for layer in layers:
            below.append(layer @ below[-1])
        above, changes = risk_gradient(below[-1], sigma, m), []
        for i in reversed(range(len(layers))):
            changes.append(above @ below[i].T)
            above = layers[i].T @ above
        for layer, change in zip(layers, reversed(changes), strict=True):
            layer -= lr * change
    return layers


def profile(strength: Float[Tensor, "p"], flips: Float[Tensor, "p"], noise: float) -> Float[Tensor, "p"]:
    """What each feature weighs after the head: w_i = |1 - 2 alpha_i| phi_i / (phi_i^2 + s^2)."""
    return (1 - 2 * flips).abs() * strength / (strength.square() + noise**2)


def amplitudes(
    strength: Float[Tensor, "p"], flips: Float[Tensor, "p"], noise: float, layers: int = 2
) -> Float[Tensor, "layers p"]:
    """phi_i w_i^(l / L) after layer l of L: from start in balance, the ratio of two features grows with every layer.

    Of two layers the first is before the head, the second after it.
    """
    depth = torch.arange(1, layers + 1).to(strength) / layers
    return strength * profile(strength, flips, noise) ** depth[:, None]


def diagonal_net(
    x: Float[Tensor, "n p"], first: Float[Tensor, "p"], second: Float[Tensor, "p"], b: float
) -> tuple[Float[Tensor, "n p"], Float[Tensor, "n p"]]:
    """z and h of a diagonal net with `symmetric_relu` after its first layer: what stays below b is in z, not in h."""
    z = x * first
    return z, symmetric_relu(z, b) * second
