"""How much protection is left after what happens to pictures on their way: JPEG, resizing, blur, an upscaler."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.metrics.bootstrap import few_interval
from sfumato.metrics.perceptual import LPIPS, MSE, SSIM_WINDOW, Distance, OneMinusSSIM, lpips_missing
from sfumato.pipeline import Text2Image

from ..base import apart, seen_over
from .folder import Pair
from .latents import displacement, noised
from .mimicry import edited

Change = Callable[[Tensor], Tensor]
"""Pictures in [0, 1] to pictures of the same size."""


def jpeg(x: Float[Tensor, "n 3 height width"], quality: int = 75) -> Float[Tensor, "n 3 height width"]:
    """Through JPEG, in memory."""
    done = []
    for array in _arrays(x):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG", quality=quality)
        done.append(torch.from_numpy(np.asarray(Image.open(buffer)).copy()))
    return (torch.stack(done).permute(0, 3, 1, 2).double() / 255).to(x)


def resized(x: Float[Tensor, "n 3 height width"], factor: float = 0.5) -> Float[Tensor, "n 3 height width"]:
    """To ``factor`` of its sides and back, bicubic and antialiased, rounded to levels."""
    height, width = x.shape[-2:]
    small = (max(1, round(height * factor)), max(1, round(width * factor)))
    down = F.interpolate(x, small, mode="bicubic", antialias=True, align_corners=False)
    up = F.interpolate(down, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return _rounded(up)


def blurred(x: Float[Tensor, "n 3 height width"], sigma: float = 1.0) -> Float[Tensor, "n 3 height width"]:
    """A Gaussian of ``sigma`` pixels, edges repeated, rounded to levels."""
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    row = torch.exp(-at.square() / (2 * sigma**2))
    row = (row / row.sum()).to(x)
    kernel = (row[:, None] * row).expand(x.shape[1], 1, -1, -1)
    return _rounded(F.conv2d(F.pad(x, (reach,) * 4, mode="replicate"), kernel, groups=x.shape[1]))


def upscaled(enlarge: Change) -> Change:
    """What ``enlarge`` makes of pictures, brought back to their size by averaging."""

    def change(x: Tensor) -> Tensor:
        large = enlarge(x)
        return _rounded(F.interpolate(large, x.shape[-2:], mode="area").to(x))

    return change


def diffusion_upscaler(folder: str | Path, sampling_steps: int = 25, seed: int = 0) -> Change:
    """A diffusers upscaling pipeline that is on this machine, without a prompt.

    Raises:
        BadInput: there is none there, or it takes no pictures.
    """
    from diffusers import DiffusionPipeline

    try:
        pipe: Any = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is no diffusers pipeline on this machine: give the folder of an upscaler") from error
    if "Upscale" not in type(pipe).__name__:
        raise BadInput(f"{folder} holds a {type(pipe).__name__}, and not an upscaler")
    pipe.set_progress_bar_config(disable=True)

    def enlarge(x: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        images = [Image.fromarray(a) for a in _arrays(x)]
        made = pipe(prompt=[""] * len(images), image=images, num_inference_steps=sampling_steps, generator=rng,
                    output_type="pt").images  # fmt: skip
        return made.float().cpu()

    return enlarge


CHANGES: Mapping[str, Change] = {
    "as it was written": lambda x: x,
    "JPEG, quality 75": jpeg,
    "half the size and back": resized,
    "blur of one pixel": blurred,
}


@dataclass(frozen=True)
class Left:
    """What is left after a change, each a list with one number a picture.

    Attributes:
        moved: distance of the latents of the protected from those of the clean picture, both changed.
        chance: the same of a picture with random noise of the whole budget in place of protection.
        spoiled: distance between what img2img makes of the two (the same seed).
        spoiled_by_chance: the same of random noise.
    """

    name: str
    moved: list[float]
    chance: list[float]
    spoiled: list[float]
    spoiled_by_chance: list[float]

    def to_json(self, first: Left, seed: int = 0) -> dict[str, Any]:
        """Means with intervals over pictures, and the shares of ``first`` (no change) that are left beyond chance."""
        figures = {k: interval(getattr(self, k), seed) for k in ("moved", "chance", "spoiled", "spoiled_by_chance")}
        return {
            "name": self.name, **figures,
            "left": share_left(self.moved, self.chance, first.moved, first.chance),
            "left_of_edits": share_left(self.spoiled, self.spoiled_by_chance, first.spoiled, first.spoiled_by_chance),
        }  # fmt: skip


def share_left(
    moved: Sequence[float], chance: Sequence[float], moved_first: Sequence[float], chance_first: Sequence[float]
) -> float | None:
    """(mean moved - mean chance) / (the same before the change); None where there was nothing beyond chance before."""
    mean = lambda values: sum(values) / len(values)
    before = mean(moved_first) - mean(chance_first)
    return (mean(moved) - mean(chance)) / before if before > 0 else None


def interval(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """A mean with its 95 % interval, as JSON; ends of None where there are too few."""
    rng = torch.Generator().manual_seed(seed)
    made = few_interval(torch.tensor(values, dtype=torch.float64), rng, least=0.0)
    ends = {"low": made.low, "high": made.high}
    return {"value": made.value, "n": made.n, **{k: None if v != v else v for k, v in ends.items()}}


def judge_of(side: int) -> Distance:
    """LPIPS where it is installed, 1 - SSIM where pictures are large enough, else squared error."""
    if not lpips_missing():
        return LPIPS()
    return OneMinusSSIM() if side >= SSIM_WINDOW else MSE()


def survival(
    p: Text2Image,
    pairs: Sequence[Pair],
    budget: int,
    *,
    changes: Mapping[str, Change] = CHANGES,
    prompt: str = "a photo",
    strength: float = 0.3,
    sampling_steps: int = 100,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[Left]:
    """What is left after each change, picture by picture, against random noise of the same ``budget``.

    Noise, seeds and steps of clean, protected and noised picture are the same. ``advance`` is called once a change and
    picture.
    """
    cut = [square(p, pair) for pair in pairs]
    found = []
    for name, change in changes.items():
        rows: list[list[float]] = [[], [], [], []]
        for i, (clean, safe) in enumerate(cut):
            control = _rounded(noised(clean, budget, seed + i))
            sides = [change(x) for x in (clean, safe, control)]
            drawn = edited(p, torch.cat(sides), [seed + i] * 3, prompt=prompt, strength=strength,
                           sampling_steps=sampling_steps)  # fmt: skip
            judge = judge_of(clean.shape[-1])
            for k in (1, 2):
                rows[k - 1].append(float(displacement(p, sides[k], sides[0])[0]))
                rows[k + 1].append(float(judge(drawn[k : k + 1], drawn[:1])))
            advance()
        found.append(Left(name, *rows))
    return found


def square(p: Text2Image, pair: Pair) -> tuple[Tensor, Tensor]:
    """The central squares of both pictures as models see them: not resized, which would itself undo protection.

    Raises:
        BadInput: the picture is smaller than what the model can draw.
    """
    unit = p.codec.factor * p.codec.multiple
    height, width = pair.clean.shape[-2:]
    side = min(height, width, p.size) // unit * unit
    if not side:
        raise BadInput(f"{pair.name} is smaller than {unit} pixels, and cannot be judged with this model")
    top, left = (height - side) // 2, (width - side) // 2
    sides = []
    for picture in (pair.clean, pair.safe):
        colour, alpha = apart(picture)
        seen = seen_over(alpha)(2 * colour - 1) / 2 + 0.5
        sides.append(seen[..., top : top + side, left : left + side])
    return sides[0], sides[1]


def _rounded(x: Tensor) -> Tensor:
    return (255 * x.clamp(0, 1)).round() / 255


def _arrays(x: Tensor) -> list[np.ndarray]:
    return list((255 * x.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy())
