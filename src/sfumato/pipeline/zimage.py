"""Z-Image: a language model with its chat template as text encoder, one stream of text and picture, a flow."""

from __future__ import annotations

import torch

from . import chat, text
from .anatomy import ZImageAnatomy
from .base import Text2Image
from .clock import Clock, FlowClock
from .codec import Codec
from .conditioning import Conditioning

_LENGTH = 512
_SIDE = 128
"""Of the latent of a picture of the default size; the pipeline has no word for it."""


class ZImage(Text2Image):
    """The adapter for ``ZImagePipeline``.

    Diffusers writes guidance here as c + g (c - u); ``cfg_scale`` is 1 + g, as in all other families, at first 6. A
    conditioning's rows are those of the chat template with the prompt in it, and of padding, which is zeros and which
    the network is not given.
    """

    family = "zimage"
    title = "Z-Image"
    default_cfg_scale = 6.0
    closed = False
    masked = True
    conditional_first = True

    @classmethod
    def plain(cls, pipe) -> bool:
        config = pipe.transformer.config
        return config.in_channels == pipe.vae.config.latent_channels and config.siglip_feat_dim is None

    def _make_anatomy(self) -> ZImageAnatomy:
        return ZImageAnatomy(self.pipe.transformer, side=self.size // self.scale_factor)

    def _make_clock(self) -> Clock:
        return FlowClock.of(self.pipe.scheduler, scale=1.0, patch=2, even=True, backward=True, negated=True)

    @property
    def codec(self) -> Codec:
        return Codec(self.pipe.vae, multiple=2)

    def _size(self) -> int:
        return getattr(self.pipe, "default_sample_size", _SIDE) * self.scale_factor

    def text_parts(self) -> list[tuple[str, str]]:
        return [("tokenizer", "text_encoder")]

    def text_lengths(self) -> list[int]:
        return [_LENGTH]

    def _texts(self, prompts: list[str]) -> list[str]:
        return chat.templated(self.tokenizers[0], prompts, enable_thinking=True)

    def _phrase(self, phrase: str) -> str:
        return phrase

    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        (read,) = reads
        out = text.run(self.pipe.text_encoder, read, attention_mask=read.mask.bool(), output_hidden_states=True)
        framed = chat.framed(text.layout(read), self.tokenizers[0], *chat.around(self._texts([chat.PROMPT])[0]))
        return Conditioning(tokens=torch.where(framed["mask"][..., None], out.hidden_states[-2], 0), **framed)
