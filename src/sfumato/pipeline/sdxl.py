"""Stable Diffusion XL: two text encoders, a pooled embedding and the picture's size as conditioning."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Text2Image
from .conditioning import Conditioning


class StableDiffusionXL(Text2Image):
    """The adapter for ``StableDiffusionXLPipeline``."""

    family = "sdxl"
    default_cfg_scale = 5.0

    def text_parts(self) -> list[tuple[str, str]]:
        # A refiner-style checkpoint has the second text encoder only.
        both = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
        return both if self.pipe.text_encoder is not None else both[1:]

    def _encode_ids(self, ids: list[Tensor], mask: Tensor, size: int) -> Conditioning:
        outputs = [
            getattr(self.pipe, encoder)(row, output_hidden_states=True)
            for row, (_, encoder) in zip(ids, self.text_parts(), strict=True)
        ]
        # SDXL was trained on the last but one layer, without the final normalisation.
        tokens = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
        # By the mask, not by ids: checkpoints with the historical end token 2 pool at the largest id, a
        # learned word's.
        ends = mask.sum(dim=1) - 1
        final = outputs[-1].last_hidden_state[torch.arange(len(ends), device=ends.device), ends]
        pooled = self.pipe.text_encoder_2.text_projection(final)
        sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=tokens.device)
        return Conditioning(
            tokens=tokens, ids=ids[0], mask=mask.bool(), pooled=pooled, size_ids=sizes.repeat(len(tokens), 1)
        )

    def unconditional(
        self, n: int = 1, negative: str | Conditioning | None = None, size: int | None = None
    ) -> Conditioning:
        cond = super().unconditional(n, negative, size)
        if negative is None and self.pipe.config.get("force_zeros_for_empty_prompt", True):
            return cond.replace(tokens=torch.zeros_like(cond.tokens), pooled=torch.zeros_like(cond.pooled))
        return cond
