"""How like two pictures are, by the measures that the paper compares: one number a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.metrics.perceptual import MSE, ssim

Pictures = Float[Tensor, "n 3 height width"]
BINS, HASH = 256, 8


def grey(x: Pictures) -> Float[Tensor, "n height width"]:
    """Luma of pictures in [0, 1], by the weights of ITU-R 601."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)


def cosine(a: Pictures, b: Pictures) -> Float[Tensor, "n"]:
    """Cosine of the grey pictures as vectors."""
    return F.cosine_similarity(grey(a).flatten(1), grey(b).flatten(1), dim=1)


def histogram(a: Pictures, b: Pictures) -> Float[Tensor, "n"]:
    """Overlap sum_k min(p_k, q_k) of the two histograms of 256 levels, the mean over the colours."""

    def counted(x: Pictures) -> Tensor:
        levels = (255 * x).round().long().clamp(0, BINS - 1).flatten(2)
        return torch.zeros(*levels.shape[:2], BINS, dtype=x.dtype, device=x.device).scatter_add_(
            2, levels, torch.ones_like(levels, dtype=x.dtype)
        ) / levels.shape[2]  # fmt: skip

    return torch.minimum(counted(a), counted(b)).sum(2).mean(1)


def dhash(a: Pictures, b: Pictures) -> Float[Tensor, "n"]:
    """1 - Hamming / 64 of the difference hashes: of 9 x 8 grey places, whether each is brighter than its right one."""

    def bits(x: Pictures) -> Tensor:
        small = F.interpolate(grey(x)[:, None], (HASH, HASH + 1), mode="bilinear", antialias=True, align_corners=False)
        return (small[..., :-1] > small[..., 1:]).flatten(1)

    return 1 - (bits(a) != bits(b)).to(a).mean(1)


def grey_ssim(a: Pictures, b: Pictures) -> Float[Tensor, "n"]:
    """SSIM of the grey pictures."""
    return ssim(grey(a)[:, None], grey(b)[:, None])


def likeness(a: Pictures, b: Pictures) -> Float[Tensor, "n"]:
    """Minus the mean squared error, so that more is more alike."""
    return -MSE()(a, b)


SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": likeness,
    "cosine": cosine,
    "histogram": histogram,
    "dhash": dhash,
    "ssim": grey_ssim,
    "rgb-ssim": ssim,
}
"""By name; more is more alike. "mse" is the error with its sign turned."""


def fused(attributes: Float[Tensor, "alliances k"]) -> Float[Tensor, "alliances"]:
    """One score of several attributes: their first principal component, in the direction in which they rise together.

    Each is standardised first (one that never changes counts nothing). Reconstructed from a note in the published
    repository, which does not say how attributes are scaled nor which way the component points.
    """
    x = attributes - attributes.mean(0)
    spread = x.std(0, correction=0)
    x = torch.where(spread > 0, x / spread.clamp_min(torch.finfo(x.dtype).tiny), torch.zeros_like(x))
    _, _, axes = torch.linalg.svd(x, full_matrices=False)
    axis = axes[0] * torch.where(axes[0].sum() < 0, -1.0, 1.0).to(axes)
    return x @ axis
