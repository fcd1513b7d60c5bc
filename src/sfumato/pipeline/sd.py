"""Stable Diffusion 1.x and 2.x: one CLIP text encoder."""

from __future__ import annotations

from torch import Tensor

from .base import Text2Image
from .conditioning import Conditioning


class StableDiffusion(Text2Image):
    """The adapter for ``StableDiffusionPipeline``."""

    family = "sd"
    default_cfg_scale = 7.5

    def text_parts(self) -> list[tuple[str, str]]:
        return [("tokenizer", "text_encoder")]

    def _encode_ids(self, ids: list[Tensor], mask: Tensor, size: int) -> Conditioning:
        encoder = self.pipe.text_encoder
        attention = mask if getattr(encoder.config, "use_attention_mask", False) else None
        tokens = encoder(ids[0], attention_mask=attention)[0]
        return Conditioning(tokens=tokens, ids=ids[0], mask=mask.bool())
