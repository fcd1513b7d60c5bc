"""`LatentModel`: an `ImageModel` of the latents of an autoencoder, which is saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, AutoencoderKL, ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .codec import Codec
from .image import ImageModel

AUTOENCODERS: tuple[type[ModelMixin], ...] = (AutoencoderKL, AutoencoderDC)
"""The kinds of autoencoders whose latents can be modelled."""


@dataclass(eq=False)
class LatentModel(ImageModel):
    """An `ImageModel` whose ``shape`` is that of a latent, (channel, height, width); pictures come out of ``vae``.

    Attributes:
        vae: the autoencoder, with the scale of the latents in its configuration (see `Codec`).
    """

    vae: Any = None

    further: ClassVar[Mapping[str, tuple[type[ModelMixin], ...]]] = MappingProxyType({"vae": AUTOENCODERS})

    def __post_init__(self) -> None:
        self.defaults = {"clip": False, **self.defaults}  # latents are not bounded
        super().__post_init__()
        if not isinstance(self.vae, AUTOENCODERS):
            raise BadInput(f"a model of latents needs an autoencoder, not a {type(self.vae).__name__}")

    @property
    def codec(self) -> Codec:
        return Codec(self.vae)

    @property
    def size(self) -> int:
        return self.shape[-1] * self.codec.factor

    @property
    def autoencoder(self) -> nn.Module:
        return self.vae

    def parts(self) -> dict[str, nn.Module]:
        return {"network": self.network, "vae": self.vae}

    def encode_image(
        self, x: Float[Tensor, "n 3 height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n channel h w"]:
        """Latents of pictures in [-1, 1], in the scale that the network sees: the posterior's mean, or a draw."""
        return self.codec.encode(x, generator)

    def scale_latents(self, z: Float[Tensor, "n channel h w"]) -> Float[Tensor, "n channel h w"]:
        return self.codec.scale(z)

    def decode_latents(self, z: Float[Tensor, "n channel h w"]) -> Float[Tensor, "n 3 height width"]:
        return self.codec.decode(z)
