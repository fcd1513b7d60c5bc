"""Stable Diffusion XL: two text encoders, a pooled embedding and the picture's size as conditioning."""

from __future__ import annotations

import torch

from . import text
from .base import Text2Image
from .conditioning import Conditioning
from .sd import plain_unet


class StableDiffusionXL(Text2Image):
    """The adapter for ``StableDiffusionXLPipeline``."""

    family = "sdxl"
    title = "SDXL"
    default_cfg_scale = 5.0
    control_class = "StableDiffusionXLControlNetPipeline"
    text_keys = ("clip_l", "clip_g")

    @classmethod
    def plain(cls, pipe) -> bool:
        return plain_unet(pipe.unet)

    def text_parts(self) -> list[tuple[str, str]]:
        # A refiner-style checkpoint has the second text encoder only.
        both = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
        return both if self.pipe.text_encoder is not None else both[1:]

    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        outputs = [
            text.run(getattr(self.pipe, encoder), read, output_hidden_states=True)
            for read, (_, encoder) in zip(reads, self.text_parts(), strict=True)
        ]
        # SDXL was trained on the last but one layer, without the final normalisation.
        tokens = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
        pooled = self.pipe.text_encoder_2.text_projection(text.pooled(outputs[-1].last_hidden_state, reads[0]))
        sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=tokens.device)
        size_ids = sizes.repeat(len(tokens), 1)
        return Conditioning(tokens=tokens, **text.layout(reads[0]), pooled=pooled, size_ids=size_ids)

    def unconditional(
        self, n: int = 1, negative: str | Conditioning | None = None, size: int | None = None
    ) -> Conditioning:
        cond = super().unconditional(n, negative, size)
        if negative is None and self.pipe.config.get("force_zeros_for_empty_prompt", True):
            return cond.replace(tokens=torch.zeros_like(cond.tokens), pooled=torch.zeros_like(cond.pooled))
        return cond
