"""Features first: pictures are read once, and every distance is computed from what was kept of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.data.pictures import Pictures
from sfumato.errors import BadInput
from sfumato.files import atomic_file
from sfumato.foreign import reading
from sfumato.progress import track

from .extractors import Extractor
from .frechet import Gaussian
from .moments import Moments, check_features

BATCH = 64
_FORMAT = "sfumato features 1"
_ABOUT = ("extractor", "weights", "resize", "pictures", "content")


@dataclass(frozen=True)
class Features:
    """The features of a set of pictures, one row each, and what they are features of.

    Attributes:
        values: float32, on the CPU.
        extractor, weights, resize: the extractor's name, hash and resize rule.
        pictures: how the pictures came to one size before the extractor saw them.
        content: a hash of the pictures.
        known: mean and covariance, where they have been computed already.
    """

    values: Float[Tensor, "n d"]
    extractor: str = "features given"
    weights: str = ""
    resize: str = ""
    pictures: str = ""
    content: str = ""
    known: Moments | None = None

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance, and what the Fréchet distance makes of them, computed once."""
        return Gaussian(self.values, self.known)

    def about(self) -> dict[str, str]:
        """Everything that identifies these features."""
        return {name: getattr(self, name) for name in _ABOUT}

    def save(self, file: str | os.PathLike, overwrite: bool = False) -> None:
        """Write features, mean and covariance as one safetensors file, whole or not at all."""
        m = self.gaussian.moments
        tensors = {"features": self.values.float().contiguous(), "mean": m.mean, "cov": m.cov}
        with atomic_file(file, overwrite) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT, **self.about()})

    @classmethod
    def load(cls, file: str | os.PathLike) -> Features:
        """Read what `save` wrote.

        Raises:
            BadInput: another kind of file, or a damaged one.
        """
        with reading(file, "a file of features"), safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            if about.get("format") != _FORMAT:
                raise BadInput(f"{file} holds no features that sfumato wrote")
            values, mean, cov = (opened.get_tensor(name) for name in ("features", "mean", "cov"))
        return cls(values, **{name: about.get(name, "") for name in _ABOUT}, known=Moments(len(values), mean, cov))


def extract(
    pictures: Pictures, extractor: Extractor, n: int | None = None, *, batch: int = BATCH, progress: bool = False
) -> Float[Tensor, "n d"]:
    """The features of the first ``n`` pictures (of all by default), float32, on the CPU.

    Raises:
        BadInput: a picture that cannot be read, or an extractor that does not give one finite vector for each.
    """
    n = len(pictures) if n is None else min(n, len(pictures))
    parts: list[Tensor] = []
    for images in track(Batches(pictures, n, batch), "features", show=progress):
        found = extractor(images)
        if found.ndim != 2 or len(found) != len(images):
            raise BadInput(
                f"{extractor.name} gave {tuple(found.shape)} for {len(images)} pictures instead of a vector for each"
            )
        parts.append(found.detach().to("cpu", torch.float32))
    if not parts:
        raise BadInput("there are no pictures to take features from")
    values = torch.cat(parts)
    check_features(values)
    return values


class Batches:
    """Pictures as uint8 batches (n, 3, height, width) in order, read a few batches ahead by threads."""

    def __init__(self, pictures: Pictures, n: int, size: int = BATCH, ahead: int = 2):
        self.pictures, self.n, self.size, self.ahead = pictures, n, size, ahead

    def __len__(self) -> int:
        return -(-self.n // self.size)

    def __iter__(self) -> Iterator[UInt8[Tensor, "b 3 height width"]]:
        starts = iter(range(0, self.n, self.size))
        waiting: deque[list[Future[np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        try:
            while True:
                while len(waiting) <= self.ahead and (start := next(starts, None)) is not None:
                    rows = range(start, min(start + self.size, self.n))
                    waiting.append([pool.submit(self.pictures.picture, i) for i in rows])
                if not waiting:
                    return
                arrays = np.stack([future.result() for future in waiting.popleft()])
                yield torch.from_numpy(arrays).permute(0, 3, 1, 2)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def cache_name(about: dict[str, str]) -> str:
    """The name of the file that keeps features of which all this is true."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32] + ".safetensors"


def from_cache(folder: Path, about: dict[str, str]) -> Features | None:
    """Features kept in ``folder``, or None. A damaged file counts as none, and is written anew by `into_cache`."""
    file = folder / cache_name(about)
    if not file.is_file():
        return None
    try:
        found = Features.load(file)
    except BadInput:
        return None
    return found if found.about() == about else None


def into_cache(folder: Path, features: Features) -> Path:
    """Keep features for the next run; returns the file."""
    file = folder / cache_name(features.about())
    features.save(file, overwrite=True)
    return file
