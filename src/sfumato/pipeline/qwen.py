"""Qwen-Image: a language model with a chat template as text encoder, joint attention, an autoencoder of videos."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import chat, text
from .anatomy import QwenAnatomy
from .base import Text2Image
from .clock import Clock, FlowClock
from .codec import Codec, FrameCodec
from .conditioning import Conditioning

_LENGTH = 512


class QwenImage(Text2Image):
    """The adapter for ``QwenImagePipeline``.

    ``cfg_scale`` is diffusers' ``true_cfg_scale``, at first 4, and what it steers away from is at first " ", as in the
    model's card (diffusers' own call guides only where a negative prompt is given). The guided prediction keeps the
    norm of the conditional one in every patch. A conditioning's rows are those of the prompt, of what closes the chat
    template behind it, and of padding, which is zeros and which the network is not given.
    """

    family = "qwen"
    title = "Qwen-Image"
    default_cfg_scale = 4.0
    closed = False
    padding = "longest"
    masked = True

    @classmethod
    def plain(cls, pipe) -> bool:
        config = pipe.transformer.config
        special = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
        return config.in_channels == 4 * pipe.vae.config.z_dim and not any(config.get(name) for name in special)

    def _make_anatomy(self) -> QwenAnatomy:
        return QwenAnatomy(self.pipe.transformer, side=self.size // self.scale_factor)

    def _make_clock(self) -> Clock:
        return FlowClock.of(self.pipe.scheduler, scale=1.0, patch=2, even=True)

    @property
    def codec(self) -> Codec:
        return FrameCodec(self.pipe.vae, multiple=2)

    def _size(self) -> int:
        return self.pipe.default_sample_size * self.scale_factor

    def text_parts(self) -> list[tuple[str, str]]:
        return [("tokenizer", "text_encoder")]

    @property
    def _before(self) -> int:
        """How many tokens of the template stand before the prompt."""
        return self.pipe.prompt_template_encode_start_idx

    def text_lengths(self) -> list[int]:
        return [self.pipe.tokenizer_max_length + self._before]

    @property
    def context_length(self) -> int:
        return _LENGTH

    def _sections(self) -> list[tuple[Any, int]]:
        return [(self.tokenizers[0], _LENGTH)]

    def _texts(self, prompts: list[str]) -> list[str]:
        return [self.pipe.prompt_template_encode.format(prompt) for prompt in prompts]

    def _phrase(self, phrase: str) -> str:
        return phrase

    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        (read,) = reads
        out = text.run(self.pipe.text_encoder, read, attention_mask=read.mask, output_hidden_states=True)
        layout = chat.framed(text.layout(read), self.tokenizers[0], *self.pipe.prompt_template_encode.split("{}"))
        tokens = torch.where(layout["mask"][..., None], out.hidden_states[-1], 0)
        kept = slice(self._before, self._before + _LENGTH)
        return Conditioning(tokens=tokens, **layout).part(kept).padded(_LENGTH)

    def unconditional(
        self, n: int = 1, negative: str | Conditioning | None = None, size: int | None = None
    ) -> Conditioning:
        return super().unconditional(n, negative or " ", size)

    def rescaled(
        self, guided: Float[Tensor, "batch channel height width"], cond: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """The guided prediction with the conditional one's norm in every patch of 2x2 latents."""
        patches = lambda x: x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        norm = lambda x: torch.linalg.vector_norm(patches(x), dim=(1, 3, 5), keepdim=True)
        return (patches(guided) * (norm(cond) / norm(guided))).flatten(4).flatten(2, 3)
