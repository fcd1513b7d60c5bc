"""Resize rules by name: they are part of a metric, and move it by more than most published gaps (2104.11222)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from sfumato.errors import BadInput, unknown
from sfumato.finite import require_finite_pictures, require_unit_range

HALF_LEVEL = 0.5 / 255


def clean(x: Float[Tensor, "n 3 height width"], side: int) -> Float[Tensor, "n 3 side side"]:
    """clean-fid's: PIL's bicubic filter (a = -0.5) widened with the scale, in floats, clipped, never rounded."""
    # PIL accumulates in float64; in float32 torch is off by up to 0.006 levels
    return _interpolate(x.double(), side, "bicubic", antialias=True).clamp(0, 255)


def tf1_legacy(x: Float[Tensor, "n 3 height width"], side: int) -> Float[Tensor, "n 3 side side"]:
    """TensorFlow 1's, of the first FIDs: bilinear, no antialiasing, and sampled at i * in / out (no half pixels)."""
    for axis in (2, 3):
        size = x.shape[axis]
        at = torch.arange(side, device=x.device, dtype=torch.float32) * (size / side)
        low = at.floor().long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = side
        share = (at - low).view(shape).to(x)
        below, above = x.index_select(axis, low), x.index_select(axis, high)
        x = below + (above - below) * share
    return x


def torch_bilinear(x: Float[Tensor, "n 3 height width"], side: int) -> Float[Tensor, "n 3 side side"]:
    """pytorch-fid's: bilinear at half pixels, no antialiasing."""
    return _interpolate(x, side, "bilinear")


def torch_antialias(x: Float[Tensor, "n 3 height width"], side: int) -> Float[Tensor, "n 3 side side"]:
    """torchmetrics' default: bilinear at half pixels, antialiased."""
    return _interpolate(x, side, "bilinear", antialias=True)


RULES = {
    "clean": clean,
    "tf1-legacy": tf1_legacy,
    "torch-bilinear": torch_bilinear,
    "torch-antialias": torch_antialias,
}


def resize(
    images: UInt8[Tensor, "n 3 height width"], side: int, rule: str = "clean"
) -> Float32[Tensor, "n 3 side side"]:
    """8-bit pictures brought to ``side`` pixels, float32 in [0, 255]. Pictures of that size are not touched.

    Raises:
        BadInput: there is no such rule.
    """
    if rule not in RULES:
        raise unknown("resize rule", rule, RULES)
    x = images.float()
    return x if x.shape[-2:] == (side, side) else RULES[rule](x, side).float()


def _interpolate(x: Tensor, side: int, mode: str, antialias: bool = False) -> Tensor:
    return interpolate(x, (side, side), mode=mode, antialias=antialias, align_corners=False)


def to_bytes(images: Tensor) -> UInt8[Tensor, "n 3 height width"]:
    """8-bit pictures; floats in [0, 1] are rounded to the nearest level, as a saved file holds them.

    Raises:
        NotFinite: some are NaN or infinite.
        BadInput: they are neither; see `require_unit`.
    """
    if images.dtype == torch.uint8:
        return images
    require_unit(images)
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Float[Tensor, "n 3 height width"]:
    """8-bit pictures as float32 in [0, 1]; floats are left as they are."""
    return images if images.is_floating_point() else images.float() / 255


def require_unit(images: Tensor) -> None:
    """Refuse pictures that are not floats in [0, 1]; half a level beyond, which rounds to an end, is none.

    Raises:
        NotFinite: some are NaN or infinite.
        BadInput: whole numbers, or values of another range.
    """
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise BadInput(f"pictures are 8-bit ones (uint8) or floats in [0, 1], not {kind}: convert them")
    require_finite_pictures(images)
    require_unit_range(images, "pictures of floats", HALF_LEVEL)
