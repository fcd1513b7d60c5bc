"""Flux.2 Klein: three layers of a language model as text, joint attention, latents in patches, a flow."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from . import chat, text
from .anatomy import Flux2Anatomy
from .base import Text2Image
from .clock import Clock, FlowClock
from .codec import Codec, PatchCodec
from .conditioning import Conditioning


class Flux2Klein(Text2Image):
    """The adapter for ``Flux2KleinPipeline``.

    A model that was distilled to few steps is drawn from without guidance, as in the pipeline itself. A conditioning's
    rows are those of the chat template with the prompt in it and of the padding behind, which the network sees too.
    """

    family = "flux2"
    title = "Flux.2 Klein"
    default_cfg_scale = 4.0
    closed = False
    halves = "apart"

    def __init__(self, pipe, defaults: dict[str, Any] | None = None):
        distilled = {"cfg_scale": 1.0} if pipe.config.is_distilled else {}
        super().__init__(pipe, {**distilled, **(defaults or {})})

    def __call__(self, prompt=None, *args, **kwargs):
        """Run the diffusers pipeline, whose own first argument is a picture."""
        return super().__call__(*args, prompt=prompt, **kwargs)

    @classmethod
    def plain(cls, pipe) -> bool:
        network = pipe.transformer
        return network.config.in_channels == network.out_channels == 4 * pipe.vae.config.latent_channels

    def _make_anatomy(self) -> Flux2Anatomy:
        return Flux2Anatomy(self.pipe.transformer, side=self.size // self.scale_factor)

    def _make_clock(self) -> Clock:
        return FlowClock.of(self.pipe.scheduler, scale=1.0, patch=1, even=True, shift=_empirical)

    @property
    def codec(self) -> Codec:
        return PatchCodec(self.pipe.vae)

    def _size(self) -> int:
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def text_parts(self) -> list[tuple[str, str]]:
        return [("tokenizer", "text_encoder")]

    def text_lengths(self) -> list[int]:
        return [self.pipe.tokenizer_max_length]

    def _texts(self, prompts: list[str]) -> list[str]:
        return chat.templated(self.tokenizers[0], prompts, enable_thinking=False)

    def _phrase(self, phrase: str) -> str:
        return phrase

    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        (read,) = reads
        options = {"attention_mask": read.mask, "output_hidden_states": True, "use_cache": False}
        out = text.run(self.pipe.text_encoder, read, **options)
        layers = inspect.signature(self.pipe.__call__).parameters["text_encoder_out_layers"].default
        tokens = torch.cat([out.hidden_states[i] for i in layers], dim=-1)
        around = chat.around(self._texts([chat.PROMPT])[0])
        return Conditioning(tokens=tokens, **chat.framed(text.layout(read), self.tokenizers[0], *around))


def _empirical(tokens: int, steps: int) -> float:
    """mu as the pipeline itself has it."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return compute_empirical_mu(tokens, steps)
