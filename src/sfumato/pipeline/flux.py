"""Flux.1 (dev and schnell): T5 for the tokens and CLIP for the pooled embedding, joint attention, flow prediction."""

from __future__ import annotations

from typing import Any

import torch

from . import text
from .anatomy import FluxAnatomy
from .base import Text2Image
from .clock import Clock, FlowClock
from .codec import Codec
from .conditioning import Conditioning


class Flux(Text2Image):
    """The adapter for ``FluxPipeline``.

    Where guidance was distilled into the network (dev), it is told ``defaults["guidance"]``, at first 3.5; real
    guidance, diffusers' ``true_cfg_scale``, is ``cfg_scale`` here, at first 1, which is none.
    """

    family = "flux"
    title = "Flux.1"
    default_cfg_scale = 1.0
    text_keys = ("clip_l", "t5")

    @classmethod
    def plain(cls, pipe) -> bool:
        network = pipe.transformer
        return network.config.in_channels == network.out_channels == 4 * pipe.vae.config.latent_channels

    def _make_anatomy(self) -> FluxAnatomy:
        return FluxAnatomy(self.pipe.transformer, side=self.size // self.scale_factor)

    def _make_clock(self) -> Clock:
        return FlowClock.of(self.pipe.scheduler, scale=1.0, patch=2, even=True)

    @property
    def codec(self) -> Codec:
        return Codec(self.pipe.vae, multiple=2)

    def _size(self) -> int:
        return self.pipe.default_sample_size * self.scale_factor

    def text_parts(self) -> list[tuple[str, str]]:
        return [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]

    def text_lengths(self) -> list[int]:
        return [self.pipe.tokenizer_max_length, 512]

    def _sections(self) -> list[tuple[Any, int]]:
        return [(self.tokenizers[1], self.text_lengths()[1])]

    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        clip, t5 = reads
        pooled = text.pooled(text.run(self.pipe.text_encoder, clip).last_hidden_state, clip)
        tokens = text.run(self.pipe.text_encoder_2, t5)[0]
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(tokens),), self.defaults.get("guidance", 3.5), device=tokens.device)
        return Conditioning(tokens=tokens, **text.layout(t5), pooled=pooled, guidance=guidance)
