"""Metrics of pictures one by one, against a reference or a prompt, as objects with ``update``, ``compute``, ``reset``.

    psnr = PairMetric("psnr", PSNR(), better="higher")
    psnr.update(restored, originals)
    psnr.compute()                      # a `Score`: the mean, its interval, and everything that decides them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

import sfumato
from sfumato.errors import BadInput
from sfumato.finite import NotFinite

from .bootstrap import Estimate, mean_interval
from .gather import gather_rows
from .record import Score, scored
from .resize import to_bytes, to_float


class PairMetric:
    """The mean over pictures of a measure that gives one number for each.

    Args:
        name: of the metric.
        measure: takes pictures in [0, 1] and what they are held against (pictures or prompts), and has ``name``,
            ``hash`` and ``resize`` as `perceptual.Distance`; the mean is kept from falling below its ``least``, where
            it has one.
        convention: how the number is defined, in words.
        seed, level: of the interval, which is over pictures.
        about: what else the record says, e.g. ``pictures`` and ``real``.
    """

    def __init__(
        self,
        name: str,
        measure: Callable[[Tensor, Any], Tensor],
        *,
        better: Literal["lower", "higher"] = "lower",
        convention: str = "",
        seed: int = 0,
        level: float = 0.95,
        about: Mapping[str, Any] | None = None,
    ):
        self.about = dict(about or {})
        self.measure: Any = measure
        self.name, self.better, self.convention = name, better, convention
        self.seed, self.level = seed, level
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self._values: list[Tensor] = []

    def update(self, images: Tensor, against: Tensor | Sequence[str]) -> Tensor:
        """Add pictures (n, 3, height, width), uint8 or floats in [0, 1]; returns their own numbers, float64.

        Raises:
            BadInput: another number of references or prompts, references of another size, or a number that is NaN.
        """
        if len(images) != len(against):
            raise BadInput(f"{self.name} pairs {len(images)} pictures with {len(against)}: give one for each")
        if isinstance(against, Tensor):
            if images.shape != against.shape:
                raise BadInput(f"{self.name} compares pictures of one size: {_size(images)} is not {_size(against)}")
            against = to_float(to_bytes(against))
        values = self.measure(to_float(to_bytes(images)), against).detach().to("cpu", torch.float64)
        if bool(values.isnan().any()):
            row = int(values.isnan().nonzero()[0])
            raise NotFinite(f"{self.name} of picture {row} is no number (NaN): its network or its pictures are broken")
        self._values.append(values)
        return values

    def compute(self) -> Score:
        """The mean over the pictures of all processes.

        Raises:
            BadInput: there were none.
        """
        local = torch.cat(self._values)[:, None] if self._values else torch.empty(0, 1, dtype=torch.float64)
        values = gather_rows(local)[:, 0]
        if not len(values):
            raise BadInput(f"{self.name} has seen no pictures: update it with some first")
        if bool(torch.isfinite(values).all()):
            generator = torch.Generator().manual_seed(self.seed)
            estimate = mean_interval(values, generator, level=self.level, resamples=2_000)
        else:  # PSNR of a picture that was reproduced exactly
            estimate = Estimate(float(values.mean()), math.nan, math.nan, len(values), "none")
        numbers = scored(estimate, "pictures", self.level)
        least = getattr(self.measure, "least", -math.inf)
        numbers["value"] = max(numbers["value"], least)
        protocol = {
            "extractor": self.measure.name,
            "weights": self.measure.hash,
            "resize": self.measure.resize,
            "pictures": "",
            "dtype": "float32 values, float64 mean",
            "convention": self.convention,
            "real": "",
            "seed": self.seed,
            "version": sfumato.__version__,
            **self.about,
        }
        return Score(self.name, n_real=0, n_gen=len(values), protocol=protocol, better=self.better, **numbers)


def _size(images: Tensor) -> str:
    return "x".join(map(str, images.shape[-2:]))
