"""How much each element of a prediction owes to some columns of an attention map, by the map's gradient.

``f`` takes what is added to the attention probabilities W (head, query, key) of one layer and one picture, and gives
the prediction: so its derivative at 0 is the prediction's by W, everything behind the layer included. ``where`` says
which queries and keys count: the picture's, and the subject's. Everything runs in float64 too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .geometry import pushed

Response: TypeAlias = Callable[[Float[Tensor, "head query key"]], Float[Tensor, "channel height width"]]
Rectifier = Literal["abs", "relu"]


def rectified(g: Float[Tensor, "*dims"], rectifier: Rectifier) -> Float[Tensor, "*dims"]:
    """|g|, since a latent is no score of a class and both signs matter; or max(g, 0), as for classifiers."""
    return g.abs() if rectifier == "abs" else g.relu()


def by_element(
    f: Response,
    w: Float[Tensor, "head query key"],
    where: Bool[Tensor, "query key"],
    rectifier: Rectifier = "abs",
    chunk: int = 8,
) -> Float[Tensor, "channel height width"]:
    """sum W R(d eps_p / dW) over heads and ``where``, for every element p of the prediction.

    Grad-SAM's score (arXiv:2204.11073) without its constant factor. Cost: one backward pass, from the end to the
    layer, for every element, ``chunk`` of them together.
    """
    with torch.enable_grad():
        leaf = torch.zeros_like(w, requires_grad=True)
        out = f(leaf)
        scores = []
        for part in torch.eye(out.numel(), dtype=out.dtype, device=out.device).split(chunk):
            cotangents = part.view(-1, *out.shape)
            (grads,) = torch.autograd.grad(out, leaf, cotangents, retain_graph=True, is_grads_batched=True)
            scores.append((rectified(grads, rectifier) * (w * where)).sum((1, 2, 3)))
    return torch.cat(scores).view(out.shape).detach()


def by_scaling(
    f: Response, w: Float[Tensor, "head query key"], where: Bool[Tensor, "query key"], rectifier: Rectifier = "abs"
) -> Float[Tensor, "channel height width"]:
    """R(d eps_p / ds) where the chosen entries of W are multiplied by 1 + s, without being normalised again.

    That is R of the sum of W d eps_p / dW: the rectifier comes after the sum, where `by_element` has it inside. One
    product forward gives it for every element.
    """
    return rectified(pushed(lambda rows: f(rows[0])[None], torch.zeros_like(w), (w * where)[None])[0], rectifier)


def by_column(
    f: Response,
    w: Float[Tensor, "head query key"],
    where: Bool[Tensor, "query key"],
    rectifier: Rectifier = "abs",
    squares: bool = False,
) -> Float[Tensor, "query"]:
    """mean over heads of sum_k W R(dy / dW), for each query, with y the sum of the prediction: one backward pass.

    Elements of the prediction may cancel in y before the rectifier; ``squares`` takes half the sum of their squares.
    """
    with torch.enable_grad():
        leaf = torch.zeros_like(w, requires_grad=True)
        out = f(leaf)
        (grad,) = torch.autograd.grad(out.square().sum() / 2 if squares else out.sum(), leaf)
    return (rectified(grad, rectifier) * (w * where)).sum(2).mean(0).detach()


def by_attention(w: Float[Tensor, "head query key"], where: Bool[Tensor, "query key"]) -> Float[Tensor, "query"]:
    """mean over heads of sum_k W, for each query, without any gradient: what to compare with."""
    return (w * where).sum(2).mean(0)


def laid_out(score: Float[Tensor, "row column"], shape: tuple[int, int, int]) -> Float[Tensor, "channel height width"]:
    """Scores of a feature map as those of a latent: bilinear, divided by the largest, all channels alike."""
    grid = F.interpolate(score[None, None], shape[1:], mode="bilinear", align_corners=False)[0]
    return (grid / grid.amax().clamp_min(torch.finfo(grid.dtype).tiny)).expand(shape).contiguous()


def blurred(x: Float[Tensor, "channel height width"], sigma: float = 6.0) -> Float[Tensor, "channel height width"]:
    """A Gaussian of 3 x 3 (with this sigma nearly a box), the border repeated."""
    at = torch.exp(-torch.arange(-1, 2, dtype=x.dtype, device=x.device).square() / (2 * sigma**2))
    kernel = (at[:, None] * at / at.sum() ** 2)[None, None]
    return F.conv2d(F.pad(x[:, None], (1, 1, 1, 1), mode="replicate"), kernel)[:, 0]


def dilated(x: Float[Tensor, "channel height width"], times: int = 3) -> Float[Tensor, "channel height width"]:
    """The greatest value within a square of 3 x 3, so many times; what lies outside does not count."""
    for _ in range(times):
        x = F.max_pool2d(x[None], 3, 1, 1)[0]
    return x


def boxed(x: Float[Tensor, "channel height width"]) -> Float[Tensor, "channel height width"]:
    """Sums over squares of 3 x 3, with zeros outside."""
    return F.conv2d(x[:, None], x.new_ones(1, 1, 3, 3), padding=1)[:, 0]


def subject_mask(
    score: Float[Tensor, "channel height width"],
    smooth: Literal["card", "official"] = "card",
    per_channel: bool = True,
) -> Bool[Tensor, "channel height width"]:
    """Where the smoothed score is above its mean plus half its standard deviation (n - 1 in the variance, strictly).

    Args:
        smooth: "card" blurs, then dilates; "official" is what the published code comes to: it overwrites its Gaussian,
            and each of its dilations starts from the raw map, which leaves one box of sums.
        per_channel: each channel has a mask of its own; else all have that of the greatest score of any.
    """
    x = score if per_channel else score.amax(0, keepdim=True)
    x = dilated(blurred(x)) if smooth == "card" else boxed(x)
    flat = x.flatten(1)
    threshold = flat.mean(1) + 0.5 * flat.std(1)
    return (x > threshold[:, None, None]).expand(score.shape)


def kept(
    z: Float[Tensor, "*dims"], reference: Float[Tensor, "*dims"], mask: Bool[Tensor, "*dims"]
) -> Float[Tensor, "*dims"]:
    """``z`` where the mask is True, and the noised ``reference`` elsewhere."""
    return torch.where(mask, z, reference)
