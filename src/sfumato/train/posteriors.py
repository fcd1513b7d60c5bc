"""What a frozen autoencoder makes of pictures by name, each encoded by itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sfumato.data.base import squared
from sfumato.pipeline import Text2Image
from sfumato.pipeline.interleaved import fitted

Posterior = tuple[Float[Tensor, "channel h w"], Float[Tensor, "channel h w"]]
"""Mean and deviation of a picture's latent, on the CPU."""


class Posteriors:
    """The posteriors of pictures, as the network sees latents; kept in memory, if wanted.

    A picture is encoded by itself, so that its latents do not depend on when it is first met.
    """

    def __init__(self, model: Text2Image, picture: Callable[[Any], np.ndarray], size: int, keep: bool = True):
        self.model, self.picture, self.size, self.keep = model, picture, size, keep
        self._kept: dict[Hashable, Posterior] = {}

    def square(self, name: Hashable) -> Posterior:
        """Of the picture's middle, cut to a square and resized."""
        return self._of((name, "square"), lambda image: squared(image, self.size))

    def fitted(self, name: Hashable) -> Posterior:
        """Of the picture as an input picture; see `sfumato.pipeline.interleaved.fitted`."""
        unit = 2 * self.model.scale_factor
        return self._of((name, "fitted"), lambda image: fitted(image, self.size, unit))

    @torch.no_grad()
    def _of(self, key: tuple[Hashable, str], prepared: Callable[[Image.Image], Image.Image]) -> Posterior:
        if key in self._kept:
            return self._kept[key]
        pixels = np.asarray(prepared(Image.fromarray(self.picture(key[0]))))
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        mean, std = (part[0].cpu() for part in self.model.posterior(x.to(self.model.autoencoder.device)))
        if self.keep:
            self._kept[key] = mean, std
        return mean, std
