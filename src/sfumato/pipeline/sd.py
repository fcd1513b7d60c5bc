"""Stable Diffusion 1.x and 2.x: one CLIP text encoder."""

from __future__ import annotations

from . import text
from .base import Text2Image
from .conditioning import Conditioning
from .distilled import listens_to_guidance


def plain_unet(network) -> bool:
    """Whether a U-Net takes a latent and a text only, and was not distilled with guidance that it listens to."""
    return network.config.in_channels == network.config.out_channels and not listens_to_guidance(network)


class StableDiffusion(Text2Image):
    """The adapter for ``StableDiffusionPipeline``."""

    family = "sd"
    title = "Stable Diffusion 1.x/2.x"
    default_cfg_scale = 7.5
    control_class = "StableDiffusionControlNetPipeline"

    @classmethod
    def plain(cls, pipe) -> bool:
        return plain_unet(pipe.unet)

    def text_parts(self) -> list[tuple[str, str]]:
        return [("tokenizer", "text_encoder")]

    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        (read,), encoder = reads, self.pipe.text_encoder
        attention = read.mask if getattr(encoder.config, "use_attention_mask", False) else None
        return Conditioning(tokens=text.run(encoder, read, attention_mask=attention)[0], **text.layout(read))
