"""Sana: one language model as text encoder, a transformer with linear self-attention, a deep autoencoder, a flow."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from . import text
from .anatomy import SanaAnatomy
from .base import Text2Image
from .clock import Clock, FlowClock
from .codec import Codec
from .conditioning import Conditioning

_LENGTH = 300


class Sana(Text2Image):
    """The adapter for ``SanaPipeline``.

    A prompt is read after the instruction that the pipeline itself puts before it, and only the start token and the
    prompt's own rows are kept; what guidance steers away from is read without it. Prompts have no end token, so a
    conditioning's rows are the start token, the words and padding.
    """

    family = "sana"
    title = "Sana"
    default_cfg_scale = 4.5
    anatomy_type = SanaAnatomy
    closed = False
    masked = True

    @classmethod
    def plain(cls, pipe) -> bool:
        config = pipe.transformer.config
        return config.in_channels == pipe.vae.config.latent_channels and not config.out_channels % config.in_channels

    def _make_clock(self) -> Clock:
        config = self.network.config
        scale = config.timestep_scale * self.pipe.scheduler.config.num_train_timesteps
        return FlowClock.of(self.pipe.scheduler, scale=scale, patch=config.patch_size)

    @property
    def codec(self) -> Codec:
        return Codec(self.pipe.vae, self.network.config.patch_size)

    @property
    def instruction(self) -> str:
        """What stands before every prompt: the pipeline's own ``complex_human_instruction``."""
        return "\n".join(inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default)

    def text_parts(self) -> list[tuple[str, str]]:
        return [("tokenizer", "text_encoder")]

    def text_lengths(self) -> list[int]:
        return [len(self.tokenizers[0].encode(self.instruction)) + _LENGTH - 2]

    @property
    def context_length(self) -> int:
        return _LENGTH

    def _sections(self) -> list[tuple[Any, int]]:
        return [(self.tokenizers[0], _LENGTH)]

    def _texts(self, prompts: list[str]) -> list[str]:
        return [self.instruction + text for text in self._cleaned(prompts)]

    def _phrase(self, phrase: str) -> str:
        return self._cleaned([phrase])[0]

    def _cleaned(self, texts: list[str]) -> list[str]:
        return self.pipe._text_preprocessing(texts)

    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        (read,) = reads
        tokens = text.run(self.pipe.text_encoder, read, attention_mask=read.mask)[0]
        length = tokens.shape[1]
        kept = [0, *range(max(1, length - _LENGTH + 1), length)]
        return Conditioning(tokens=tokens, **text.layout(read)).part(kept)

    def unconditional(
        self, n: int = 1, negative: str | Conditioning | None = None, size: int | None = None
    ) -> Conditioning:
        if not isinstance(negative, Conditioning):
            said = negative or ""
            read = text.tokenize(self.tokenizers[0], self._cleaned([said]), _LENGTH, self.device)
            with torch.no_grad():
                negative = self._encode([read], self.size).replace(prompts=(said,))
        return super().unconditional(n, negative, size)
