"""Frozen encoders of pictures that a model is conditioned on: one vector of a picture, or vectors of its places."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.metrics.extractors import ORACLE, make_extractor


class Eye:
    """A frozen encoder by name.

    Args:
        encoder: "oracle" (the sketch world's: 128 features, 4x4 places of 160), "random-cnn" or "pixels" (one vector,
            which is the only place), or any vision model of `transformers`, a folder or hub id: the class token, or
            CLIP's image embedding, and the last hidden state of every patch.

    Raises:
        BadInput: no such encoder.
    """

    def __init__(self, encoder: str):
        self.extractor: Any = make_extractor(encoder)
        self.encoder, self.name, self.sha256 = encoder, self.extractor.name, self.extractor.hash

    @torch.no_grad()
    def whole(self, pictures: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n dim"]:
        """One vector for each picture, float32."""
        return self.extractor(pictures).float()

    @torch.no_grad()
    def tokens(self, pictures: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n token width"]:
        """The vectors of the places of each picture, float32; as many for every picture."""
        if self.encoder == ORACLE:
            return _places(self.extractor.network, pictures)
        vision = getattr(self.extractor, "vision", None)
        if vision is None:
            return self.whole(pictures)[:, None]
        network = getattr(vision.network, "vision_model", vision.network)  # CLIP's tower for pictures
        pixels = vision.prepare(pictures.to(vision.device).float() / 255)
        state = network(pixel_values=pixels).last_hidden_state
        return (state.flatten(2).mT if state.ndim == 4 else state).float()


def _places(oracle: Any, pictures: Tensor) -> Tensor:
    """The oracle's last feature maps, [n, 16, 160]."""
    found: list[Tensor] = []
    hook = oracle.trunk[5].register_forward_hook(lambda *passed: found.append(passed[-1]))
    try:
        oracle.features(pictures.float() / 255)
    finally:
        hook.remove()
    return found[0].flatten(2).mT


def as_bytes(pictures: Tensor) -> UInt8[Tensor, "n 3 height width"]:
    """Pictures in [0, 1], or of 8 bits, as encoders take them: of 8 bits.

    Raises:
        BadInput: something else.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise BadInput(f"pictures to see are a tensor (n, 3, height, width) in [0, 1], not {tuple(pictures.shape)}")
    if pictures.dtype == torch.uint8:
        return pictures
    if not pictures.is_floating_point() or not 0 <= pictures.min() <= pictures.max() <= 1:
        raise BadInput("pictures to see are numbers from 0 to 1, or of 8 bits (uint8)")
    return (pictures * 255).round().to(torch.uint8)
