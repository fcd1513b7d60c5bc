"""Masks of objects out of a network's own attention, as AttenCraft makes them (arXiv:2405.17965)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sfumato.pipeline import Text2Image
from sfumato.pipeline.anatomy import Site

SMALL = 1e-12
Upsampling = Literal["bicubic", "bilinear", "nearest"]


def minmax(x: Float[Tensor, "*shape"], dims: int = 2) -> Float[Tensor, "*shape"]:
    """Each map (the last ``dims`` dimensions) from 0 to 1; a constant one is 0."""
    flat = x.flatten(-dims)
    low, high = flat.amin(-1), flat.amax(-1)
    shape = (*low.shape, *[1] * dims)
    return (x - low.view(shape)) / (high - low).clamp(min=SMALL).view(shape)


def resized(
    maps: Float[Tensor, "*batch h w"], side: int, how: Upsampling = "bicubic"
) -> Float[Tensor, "*batch side side"]:
    """By interpolation, without antialiasing or aligned corners; a map of that size is left as it is."""
    if maps.shape[-1] == side:
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, (side, side), mode=how).view(*maps.shape[:-2], side, side)


def affinity(attention: Float[Tensor, "*batch cells cells"], power: int = 4) -> Float[Tensor, "*batch cells cells"]:
    """R = minmax(S^power) of self-attention S = minmax(attention), a matrix power."""
    return minmax(torch.linalg.matrix_power(minmax(attention), power))


def refined(
    maps: Float[Tensor, "*batch word side side"], closeness: Float[Tensor, "*batch cells cells"]
) -> Float[Tensor, "*batch word side side"]:
    """r_k = minmax(R b_k) with b_k = minmax(a_k^2), for each word's map a_k.

    Args:
        maps: a_k, cross-attention at the side of self-attention's maps.
        closeness: R, `affinity`.
    """
    flat = minmax(maps.square()).flatten(-2)
    return minmax((flat @ closeness.transpose(-1, -2)).view_as(maps))


def separated(maps: Float[Tensor, "*batch word h w"], threshold: float = 0.1) -> Bool[Tensor, "*batch word h w"]:
    """Where a map is larger by more than ``threshold`` than each other one; elsewhere a cell is nobody's."""
    n = maps.shape[-3]
    if n == 1:
        return torch.ones_like(maps, dtype=torch.bool)
    rival = torch.stack([maps[..., [j for j in range(n) if j != k], :, :].amax(-3) for k in range(n)], dim=-3)
    return maps - rival > threshold


def assigned(maps: Float[Tensor, "word h w"], masks: Bool[Tensor, "word h w"]) -> Int[Tensor, "mask"]:
    """For each mask c the word argmax_k sum(r_k m_c)."""
    return torch.einsum("khw,chw->ck", maps, masks.to(maps)).argmax(dim=1)


def js_divergence(a: Float[Tensor, "*batch h w"], b: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence, in nats, of the softmax over all cells of two maps."""
    p, q = a.flatten(-2).softmax(-1), b.flatten(-2).softmax(-1)
    m = (p + q) / 2
    entropy = lambda x: (x * (x + 1e-16).log()).sum(-1)
    return entropy(p) / 2 + entropy(q) / 2 - entropy(m)


def structural_similarity(
    a: Float[Tensor, "h w"], b: Float[Tensor, "h w"], window: int = 7, peak: float = 1.0
) -> Float[Tensor, ""]:
    """SSIM with a uniform window and sample covariances, its mean over where the window fits.

    A map smaller than the window has the largest odd one that fits.
    """
    window = min(window, a.shape[-1] - 1 + a.shape[-1] % 2)
    mean = lambda x: F.avg_pool2d(x[None, None], window, stride=1)[0, 0]
    n = window**2
    ux, uy = mean(a), mean(b)
    covariance = lambda x, y, u, v: n / max(n - 1, 1) * (mean(x * y) - u * v)
    vx, vy, vxy = covariance(a, a, ux, ux), covariance(b, b, uy, uy), covariance(a, b, ux, uy)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    return ((2 * ux * uy + c1) * (2 * vxy + c2) / ((ux.square() + uy.square() + c1) * (vx + vy + c2))).mean()


def masked_loss(
    pred: Float[Tensor, "batch channel h w"],
    target: Float[Tensor, "batch channel h w"],
    mask: Float[Tensor, "batch 1 h w"],
    per: Literal["cells", "mean"] = "cells",
) -> Float[Tensor, ""]:
    """|| M pred - M target ||^2, a mean over the batch and, by ``per``, over "cells" (the sum over channels divided by
    the number of cells, as in the published code) or over all elements ("mean"); never over the area of the mask."""
    total = (mask * (pred - target)).square().mean()
    return total * pred.shape[1] if per == "cells" else total


def attention_loss(
    maps: Float[Tensor, "word h w"], masks: Float[Tensor, "word h w"]
) -> Float[Tensor, ""]:
    """Mean over words of the JSD between softmax(minmax(a_k)) and softmax(m_k), both over all cells."""
    return js_divergence(minmax(maps), masks.to(maps)).mean()


def sampling_ratios(scores: Float[Tensor, "word"] | Sequence[float], estimated: bool) -> Float[Tensor, "options"]:
    """How often each word alone, and last all together, are asked for.

    Uniform in the released version, 1 / (K + 1) each. Estimated (reconstructed): words alone in inverse proportion to
    their attention scores, so that what is attended to less is seen more; all together keep 1 / (K + 1). One word is
    always asked for.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    n = len(scores)
    if n == 1:
        return torch.tensor([0.0, 1.0], dtype=torch.float64)
    alone = 1 / scores.clamp(min=1e-12) if estimated else torch.ones(n, dtype=torch.float64)
    return torch.cat([alone / alone.sum() * n, torch.ones(1, dtype=torch.float64)]) / (n + 1)


def start_detached(site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of position 0, the start token that stands for the background, without a gradient."""
    cut = lambda x: torch.cat([x[:, :, :1].detach(), x[:, :, 1:]], dim=2)
    return cut(key), cut(value)


class Averaged:
    """Attention probabilities, averaged over heads and layers as they come, in the graph if they are."""

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.heads = 0

    def add(self, probs: Float[Tensor, "batch head query key"]) -> None:
        self.total = self.total + probs.sum(dim=1)
        self.heads += probs.shape[1]

    @property
    def mean(self) -> Float[Tensor, "batch query key"]:
        return self.total / self.heads


def square_side(cells: int) -> int:
    """The side of a square map of so many cells."""
    return round(cells**0.5)


@contextmanager
def averaged(pipe: Text2Image, kind: str, resolution: int) -> Iterator[Averaged]:
    """What the layers of one kind and one `nearest_resolution` attend to, in the calls inside the block."""
    seen = Averaged()

    def note(site: Site, probs: Tensor) -> Tensor:
        seen.add(probs)
        return probs

    with pipe.edit_attention(note, kind, lambda site: site.resolution == resolution):
        yield seen


def nearest_resolution(pipe: Text2Image, kind: str, share: float) -> int:
    """The side of attention maps of one kind that is nearest to a share of the latent's; of two the larger.

    Both as they are at the pipeline's own size, by which its layers are known: pictures of other sizes have other maps.
    """
    pipe.anatomy.check_site_kind(kind)
    wanted = share * pipe.latent_shape()[-1]
    sides = {site.resolution for site in pipe.anatomy.sites() if site.kind == kind}
    return min(sides, key=lambda side: (abs(side - wanted), -side))
