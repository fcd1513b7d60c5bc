"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, joint attention, flow prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import text
from .anatomy import SD3Anatomy
from .base import Text2Image
from .clock import Clock, FlowClock
from .codec import Codec
from .conditioning import Conditioning

_T5_LENGTH = 256


class StableDiffusion3(Text2Image):
    """The adapter for ``StableDiffusion3Pipeline``; without T5 its rows are zeros, as in the pipeline itself.

    A conditioning's rows are those of the two CLIP encoders side by side, then those of T5.
    """

    family = "sd3"
    title = "Stable Diffusion 3"
    default_cfg_scale = 7.0
    anatomy_type = SD3Anatomy
    may_lack = ("text_encoder_3", "tokenizer_3")
    text_keys = ("clip_l", "clip_g", "t5")

    @classmethod
    def plain(cls, pipe) -> bool:
        config = pipe.transformer.config
        return config.in_channels == config.out_channels == pipe.vae.config.latent_channels

    def _make_clock(self) -> Clock:
        return FlowClock.of(self.pipe.scheduler, patch=self.network.config.patch_size)

    @property
    def codec(self) -> Codec:
        return Codec(self.pipe.vae, self.network.config.patch_size)

    def text_parts(self) -> list[tuple[str, str]]:
        both = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
        return both if self.pipe.text_encoder_3 is None else [*both, ("tokenizer_3", "text_encoder_3")]

    def text_lengths(self) -> list[int]:
        return [self.pipe.tokenizer_max_length] * 2 + [_T5_LENGTH] * (len(self.text_parts()) - 2)

    def _sections(self) -> list[tuple[Any, int]]:
        return [pair for i, pair in enumerate(zip(self.tokenizers, self.text_lengths(), strict=True)) if i != 1]

    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        outputs, pooled = [], []
        for read, encoder in zip(reads[:2], (self.pipe.text_encoder, self.pipe.text_encoder_2), strict=True):
            out = text.run(encoder, read, output_hidden_states=True)
            outputs.append(out.hidden_states[-2])
            pooled.append(encoder.text_projection(text.pooled(out.last_hidden_state, read)))
        clip = torch.cat(outputs, dim=-1)
        third = reads[2] if len(reads) > 2 else _nothing(reads[0])
        t5 = self._t5(third, clip)
        tokens = torch.cat([pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=-2)
        return Conditioning(tokens=tokens, **text.layout(reads[0], third), pooled=torch.cat(pooled, dim=-1))

    def _t5(self, read: text.Read, like: Tensor) -> Tensor:
        if self.pipe.text_encoder_3 is None:
            return like.new_zeros(*read.ids.shape, self.network.config.joint_attention_dim)
        return text.run(self.pipe.text_encoder_3, read)[0]


def _nothing(read: text.Read) -> text.Read:
    """What is read where there is no T5: padding."""
    empty = read.ids.new_zeros(len(read.ids), _T5_LENGTH)
    return text.Read(empty, empty, None, None)
