"""Where a protection's steps come from: the losses of arXiv:2311.12832 and the direction each of its sources takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Source = Literal["sds-", "sds+", "sdst-", "sdst+", "advdm+", "advdm-", "encoder", "mist", "mist-"]
Encode = Callable[[Tensor], Tensor]
"""Pictures in [-1, 1] to scaled latents, differentiable; with posterior samples another draw every time."""
Residual = Callable[[Tensor], Tensor]
"""Latents z to eps_theta(alpha_t z + sigma_t e, t, c) - e, with a time t and a noise e of its own every time."""

NEEDS_TARGET = {"sdst-", "sdst+", "encoder", "mist", "mist-"}
RANDOM_START = {"advdm+", "advdm-", "encoder", "mist", "mist-"}
THROUGH_NETWORK = {"advdm+", "advdm-", "mist", "mist-"}
"""Those that need the network's own gradient, which about doubles time and memory."""
RATES = {"sdst-": 5.0, "sdst+": 5.0, "mist": 1e4, "mist-": 1e4}


def semantic_loss(residual: Float[Tensor, "n *latent"]) -> Float[Tensor, ""]:
    """L_S: the mean over a picture's latent of || eps_theta - e ||^2, summed over pictures (each by itself)."""
    return residual.square().flatten(1).mean(1).sum()


def textural_loss(z: Float[Tensor, "n *latent"], target: Float[Tensor, "n *latent"]) -> Float[Tensor, ""]:
    """L_T: || z(x) - z(y) ||^2, a sum over everything."""
    return (z - target).square().sum()


def slope(x: Float[Tensor, "n *dims"], loss: Callable[[Tensor], Tensor]) -> Float[Tensor, "n *dims"]:
    """The gradient of a scalar loss at ``x``."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(loss(x), x)
    return found


def sds_gradient(
    x: Float[Tensor, "n *dims"], encode: Encode, residual: Residual, draws: int = 1
) -> Float[Tensor, "n *dims"]:
    """J_enc^T (eps_theta(z_t, t, c) - e): grad L_S with the network's Jacobian left out, and every weight of t.

    The network runs without gradients; only the encoder's graph is kept. The latent that is noised is the one that is
    differentiated, one draw of the posterior, as in the published code now (its first version took two).
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        z = encode(x)
    with torch.no_grad():
        v = torch.stack([residual(z.detach()) for _ in range(draws)]).mean(0)
    (pulled,) = torch.autograd.grad(z, x, v)
    return pulled


def direction(
    source: Source,
    x: Float[Tensor, "n *dims"],
    encode: Encode,
    residual: Residual,
    target: Callable[[], Tensor] | None = None,
    rate: float | None = None,
    draws: int = 1,
) -> Float[Tensor, "n *dims"]:
    """Where ``source`` goes from ``x``: a step is alpha times its sign. "+" climbs the semantic loss, "-" descends it.

    - sds+, sds-: +- J_enc^T (eps_theta - e);
    - sdst+, sdst-: +- rate J_enc^T (eps_theta - e) - grad L_T;
    - advdm+, advdm-: +- grad L_S;
    - encoder (PhotoGuard): - grad L_T;
    - mist: - grad(L_T - rate L_S); mist-: - grad(- L_T - rate L_S), as the official "-" flips the textural sign only.

    Args:
        source: one of `Source`.
        x: pictures in [-1, 1].
        encode, residual: see their types; both are of one row a picture.
        target: gives the target's latents, for those that need one.
        rate: the weight of the semantic part; by default 5, of Mist 1e4.
        draws: times and noises over which the semantic part is averaged.
    """

    def semantic(z: Tensor) -> Tensor:
        return torch.stack([semantic_loss(residual(z)) for _ in range(draws)]).mean()

    rate = RATES.get(source, 1.0) if rate is None else rate
    sign = -1.0 if source.endswith("-") else 1.0
    if source in ("sds+", "sds-"):
        return sign * sds_gradient(x, encode, residual, draws)
    if source in ("advdm+", "advdm-"):
        return sign * slope(x, lambda here: semantic(encode(here)))
    if target is None:
        raise ValueError(f"{source} needs the latents of a target")
    if source in ("sdst+", "sdst-"):
        pulled = sds_gradient(x, encode, residual, draws)
        with torch.no_grad():
            y = target()
        return sign * rate * pulled - slope(x, lambda here: textural_loss(encode(here), y))
    with torch.no_grad():
        y = target()
    if source == "encoder":
        return -slope(x, lambda here: textural_loss(encode(here), y))

    def fused(here: Tensor) -> Tensor:
        z = encode(here)
        return sign * textural_loss(z, y) - rate * semantic(z)

    return -slope(x, fused)


def pattern(height: int, width: int) -> Float[Tensor, "1 3 height width"]:
    """A zone plate in [-1, 1]: rings around the corner that grow finer to the pixel's limit at the far ends."""
    y, x = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    phase = torch.pi / 2 * (y[:, None].square() / height + x[None].square() / width)
    return torch.where(phase.cos() >= 0, 1.0, -1.0).float().expand(1, 3, height, width)
