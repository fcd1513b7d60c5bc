"""RandAugment (arXiv:1909.13719) in the variant whose changes all grow with the level, which DeiT trains with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from sfumato.train import draw

Change = Callable[[Image.Image, float, dict[str, Any]], Image.Image]


def _affine(at: int, reach: float, sideways: bool | None = None) -> Change:
    """An affine map, number ``at`` of whose six goes up to ``reach``, of the width or height where it is a shift."""

    def change(image: Image.Image, level: float, how: dict[str, Any]) -> Image.Image:
        numbers = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        numbers[at] = reach * level * (1 if sideways is None else image.size[0 if sideways else 1])
        return image.transform(image.size, Image.Transform.AFFINE, numbers, **how)

    return change


def _enhanced(kind: Callable[[Image.Image], Any]) -> Change:
    return lambda image, level, how: kind(image).enhance(max(0.1, 1 + 0.9 * level))


def _brighter_dark(image: Image.Image, level: float, how: dict[str, Any]) -> Image.Image:
    """Solarize-add: more light in all that is darker than the middle."""
    added = int(abs(level) * 110)
    return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


CHANGES: dict[str, Change] = {
    "auto-contrast": lambda image, level, how: ImageOps.autocontrast(image),
    "equalize": lambda image, level, how: ImageOps.equalize(image),
    "invert": lambda image, level, how: ImageOps.invert(image),
    "rotate": lambda image, level, how: image.rotate(30 * level, **how),
    "posterize": lambda image, level, how: ImageOps.posterize(image, max(1, 4 - int(abs(level) * 4))),
    "solarize": lambda image, level, how: ImageOps.solarize(image, 256 - int(abs(level) * 256)),
    "solarize-add": _brighter_dark,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear-x": _affine(1, 0.3),
    "shear-y": _affine(3, 0.3),
    "translate-x": _affine(2, 0.45, True),
    "translate-y": _affine(5, 0.45, False),
}
"""The changes, of an 8-bit picture by a level in [-1, 1] and how pixels between pixels are filled; those without two
ways heed the level's size alone. At the highest level a bit is kept, where none would leave black."""
_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def rand_augmented(
    x: Float[Tensor, "n 3 h w"],
    magnitude: float,
    rng: torch.Generator,
    *,
    changes: int = 2,
    chance: float = 0.5,
    spread: float = 0.5,
    fill: tuple[float, ...] = (0.485, 0.456, 0.406),
) -> Float[Tensor, "n 3 h w"]:
    """Pictures in [-1, 1] after as many random ``changes``, each made with that chance, in 8 bits.

    Args:
        magnitude: mean of the level, out of 10; it is drawn with the standard deviation ``spread``.
        fill: colour of what comes in from outside, of pixels in [0, 1].
    """
    names, n = list(CHANGES), len(x)
    plans = []
    for _ in range(changes):
        which, made, sign, how = (draw.uniform(n, rng).tolist() for _ in range(4))
        levels = ((magnitude + spread * draw.normal((n, 1), rng)[:, 0]) / 10).clamp(0, 1).tolist()
        plans.append(list(zip(which, made, sign, how, levels, strict=True)))
    colour = tuple(round(255 * part) for part in fill)
    pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    made_of = []
    for i, array in enumerate(pixels):
        image = Image.fromarray(array)
        for which, made, sign, how, level in (plan[i] for plan in plans):
            if made < chance:
                options = {"resample": _FILTERS[how < 0.5], "fillcolor": colour}
                change = CHANGES[names[int(which * len(names))]]
                image = change(image, level if sign < 0.5 else -level, options)
        made_of.append(np.asarray(image))
    return torch.from_numpy(np.stack(made_of)).permute(0, 3, 1, 2).to(x).div(127.5).sub(1)
