"""Augmentation of DeiT's kind (arXiv:2012.12877): random crops, erasing, and pictures mixed in pairs with their labels.

Pictures are in [-1, 1]. What belongs to a row is drawn with `sfumato.train.draw`, so that it is the same however a
batch is cut.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from sfumato.train import draw


def cropped(
    x: Float[Tensor, "n 3 h w"], least: float, rng: torch.Generator, aspect: float = 4 / 3
) -> Float[Tensor, "n 3 h w"]:
    """A random box of each picture, of at least the share ``least`` of its area and a ratio of sides of up to
    ``aspect``, resized to the picture's size; sides that are too long are cut."""
    height, width = x.shape[-2:]
    area = least + (1 - least) * draw.uniform(len(x), rng)
    ratio = torch.exp(math.log(aspect) * (2 * draw.uniform(len(x), rng) - 1))
    tall = ((area / ratio).sqrt() * height).round().clamp(1, height).long()
    wide = ((area * ratio).sqrt() * width).round().clamp(1, width).long()
    boxes = zip(x, *_boxes(tall, wide, height, width, rng), strict=True)
    made = [
        interpolate(row[None, :, t : t + h, s : s + w], (height, width), mode="bicubic", antialias=True)
        for row, t, s, h, w in boxes
    ]
    return torch.cat(made).clamp(-1, 1)


def erased(
    x: Float[Tensor, "n 3 h w"], chance: float, noise: tuple[tuple[float, ...], tuple[float, ...]], rng: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """With that chance, noise in a box of each picture: 2 % to a third of its area, sides of ratio 0.3 to 1/0.3.

    ``noise``: its mean and standard deviation for each channel of pixels in [0, 1].
    """
    height, width = x.shape[-2:]
    chosen = draw.uniform(len(x), rng) < chance
    area = 0.02 + (1 / 3 - 0.02) * draw.uniform(len(x), rng)
    ratio = torch.exp(math.log(0.3) * (2 * draw.uniform(len(x), rng) - 1))
    tall = ((area * ratio).sqrt() * height).round().clamp(1, max(1, height - 1)).long()
    wide = ((area / ratio).sqrt() * width).round().clamp(1, max(1, width - 1)).long()
    mean, std = (x.new_tensor(part)[:, None, None] for part in noise)
    grain = 2 * (mean + std * draw.normal(x.shape, rng)) - 1
    x = x.clone()
    for i, (t, s, h, w) in enumerate(zip(*_boxes(tall, wide, height, width, rng), strict=True)):
        if chosen[i]:
            x[i, :, t : t + h, s : s + w] = grain[i, :, t : t + h, s : s + w]
    return x


def mixed(
    x: Float[Tensor, "n 3 h w"], mixup: float, cutmix: float, switch: float, rng: torch.Generator
) -> tuple[Float[Tensor, "n 3 h w"], float]:
    """Each picture and that of the same place from the end, and the share that its own label has of the two.

    Args:
        mixup: alpha of the Beta distribution of the share of a blend, share x + (1 - share) x'; 0: none.
        cutmix: alpha of that of a box of x' in x, of the area 1 - share before it is cut at the border; 0: none.
        switch: chance of a box where there could be both.
    """
    if not mixup and not cutmix:
        return x, 1.0
    boxed = cutmix > 0 and (not mixup or float(torch.rand((), generator=rng)) < switch)
    alpha = torch.full((2,), cutmix if boxed else mixup, dtype=torch.float64)
    gamma = torch._standard_gamma(alpha, generator=rng)
    share = float(gamma[0] / gamma.sum()) if float(gamma.sum()) > 0 else 1.0
    if not boxed:
        return share * x + (1 - share) * x.flip(0), share
    height, width = x.shape[-2:]
    side = math.sqrt(1 - share)
    middle = [int(torch.randint(n, (), generator=rng)) for n in (height, width)]
    (t, b), (left, r) = (
        (max(0, m - int(n * side) // 2), min(n, m + int(n * side) // 2))
        for m, n in zip(middle, (height, width), strict=True)
    )
    y = x.clone()
    y[..., t:b, left:r] = x.flip(0)[..., t:b, left:r]
    return y, 1 - (b - t) * (r - left) / (height * width)


def _boxes(
    tall: Tensor, wide: Tensor, height: int, width: int, rng: torch.Generator
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tops, lefts, heights and widths of boxes at random places."""
    top = (draw.uniform(len(tall), rng) * (height - tall + 1)).long()
    left = (draw.uniform(len(wide), rng) * (width - wide + 1)).long()
    return top.tolist(), left.tolist(), tall.tolist(), wide.tolist()
