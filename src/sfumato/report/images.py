"""Pictures for the page: encoding, difference maps and their colour scale."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Picture = UInt8[np.ndarray, "height width 3"]

SMALL = 128
"""Pictures up to this side are embedded without loss and enlarged without smoothing."""

RAMP = ("#17120f", "#452319", "#85371f", "#bf6228", "#dca14a", "#f6ecd2")
"""Heat colours from no difference to the full range; lightness rises throughout, for a grey print."""


@dataclass(frozen=True)
class Pair:
    """One prompt and seed, drawn by the original and by the edited model (uint8 RGB)."""

    before: Picture
    after: Picture
    prompt: str = ""
    seed: int | None = None
    distance: float | None = None
    """Perceptual distance of the two, in the integrity figure's units."""


@dataclass(frozen=True)
class AttackPictures:
    """What an attack's panel shows; each list may be empty."""

    original: Sequence[Picture] = ()
    """The original model, plain prompt."""
    erased: Sequence[Picture] = ()
    """The edited model, plain prompt."""
    attacked: Sequence[Picture] = ()
    """The edited model under attack."""
    control: Sequence[Picture] = ()
    """The edited model under the control of the same budget."""


@dataclass(frozen=True)
class Gallery:
    """Pictures that go on the page; they are not part of ``report.json``."""

    targets: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    """Erased concept -> pairs on the same seeds, in seed order (never a selection of good ones)."""
    retained: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    """Retained concept -> pairs; the page itself looks for the ones that changed most."""
    attacks: Mapping[str, AttackPictures] = field(default_factory=dict)


def difference(before: Picture, after: Picture) -> Float[np.ndarray, "height width"]:
    """Root mean square of the difference over the colour channels, as a share of the full range: [0, 1]."""
    if before.shape != after.shape:
        raise ValueError(f"pictures of different size: {before.shape} and {after.shape}")
    delta = (after.astype(np.float64) - before.astype(np.float64)) / 255.0
    return np.sqrt(np.mean(delta**2, axis=-1))


def heat(share: Float[np.ndarray, "height width"]) -> Picture:
    """Colours of `RAMP` for shares in [0, 1], interpolated linearly; the scale never depends on the data."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in RAMP], dtype=np.float64)
    at = np.linspace(0.0, 1.0, len(RAMP))
    channels = [np.interp(np.clip(share, 0.0, 1.0), at, stops[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def changed_most(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The pairs with the largest distance (mean difference where none was measured), worst first."""

    def key(pair: Pair) -> float:
        return float(difference(pair.before, pair.after).mean()) if pair.distance is None else pair.distance

    return sorted(distinct(pairs), key=key, reverse=True)[:count]


def distinct(pairs: Sequence[Pair]) -> list[Pair]:
    """Each prompt and seed once: a picture of a red star is listed under both of its concepts."""
    seen = {(p.prompt, p.seed) if p.seed is not None else id(p): p for p in pairs}
    return list(seen.values())


@dataclass(frozen=True)
class Embedded:
    """A picture as the page holds it: a data URI and its size in pixels."""

    uri: str
    width: int
    height: int
    small: bool


def embed(picture: Picture, max_side: int) -> Embedded:
    """Encode for the page: lossless up to `SMALL`, otherwise at most ``max_side`` pixels and WebP."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"expected uint8 (height, width, 3), got {picture.dtype} {picture.shape}")
    image = Image.fromarray(np.ascontiguousarray(picture))
    small = max(image.size) <= SMALL
    if max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    options = {"lossless": True, "quality": 50} if small else {"quality": 84, "method": 2}
    image.save(buffer, "WEBP", **options)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Embedded(uri, *image.size, small)
