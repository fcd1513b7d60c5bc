"""Diffusion transformers with true cross-attention: PixArt and Sana."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from ..conditioning import Conditioning
from .base import Anatomy, attention_pairs, foreign, site_projections
from .explicit import ExplicitAttention, Listener, SanaAttention, SanaLinearAttention
from .parts import Projection, Site

_PIXELS = 8
"""Pixels per latent, along a side, of PixArt's autoencoder."""
_TIME_AND_OUTPUT = ("adaln_single.", "time_embed.", "norm_out.", "proj_out.", "scale_shift_table")


class Transformer(Anatomy):
    """What all diffusion transformers have: blocks one after the other, and a last linear layer."""

    output = Transformer2DModelOutput
    trunks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """The lists of blocks, in the order in which they run."""

    @property
    def last(self) -> nn.Module:
        return self.network.proj_out

    @property
    def transformers(self) -> tuple[str, ...]:
        return self.trunks

    def blocks(self) -> tuple[str, ...]:
        return tuple(f"{trunk}.{i}" for trunk in self.trunks for i in range(len(getattr(self.network, trunk))))

    @property
    def bottleneck(self) -> str:
        blocks = self.blocks()
        return blocks[len(blocks) // 2]

    @property
    def resolution(self) -> int:
        """Side of the grid of patches, at the default picture size."""
        return self.side // self.network.config.patch_size


class PixArtAnatomy(Transformer):
    """``PixArtTransformer2DModel``: cross-attention (``attn2``), self-attention (``attn1``), a learned sigma."""

    subsets: ClassVar = {
        "xattn": lambda name: ".attn2." in name,
        "xattn-strict": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
        "noxattn": lambda name: ".attn2." not in name and not name.startswith(_TIME_AND_OUTPUT),
        "selfattn": lambda name: ".attn1." in name,
    }

    def sites(self) -> list[Site]:
        return attention_pairs(self, lambda name: self.resolution)

    def every_projection(self) -> list[Projection]:
        read = self.network.caption_projection
        text = [] if read is None else [Projection("caption_projection.linear_1", "text.in", read.linear_1, 0)]
        return text + [p for site in self.sites() for p in site_projections(site)]

    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        return {
            "encoder_hidden_states": cond.tokens.to(self.dtype),
            "encoder_attention_mask": cond.mask,
            "added_cond_kwargs": self._size(z),
        }

    @property
    def text_layers(self) -> tuple[str, ...]:
        return () if self.network.caption_projection is None else ("caption_projection",)

    def text_rows(self, tokens: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length width"]:
        read = self.network.caption_projection
        return tokens if read is None else read(tokens.to(self.dtype))

    def _size(self, z: Tensor) -> dict[str, Tensor | None]:
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (_PIXELS * side for side in z.shape[-2:])
        size = torch.tensor([[height, width]], device=z.device, dtype=self.dtype)
        return {"resolution": size.repeat(len(z), 1), "aspect_ratio": (size[:, :1] / size[:, 1:]).repeat(len(z), 1)}

    def conditioning(self, inputs: dict[str, Any]) -> Conditioning:
        return foreign(inputs["encoder_hidden_states"], inputs.get("encoder_attention_mask"))


class SanaAnatomy(PixArtAnatomy):
    """``SanaTransformer2DModel``: cross-attention (``attn2``), linear self-attention (``attn1``)."""

    default_guidance = 4.5

    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        given = {"encoder_hidden_states": cond.tokens.to(self.dtype), "encoder_attention_mask": cond.mask}
        config = self.network.config
        if not config.get("guidance_embeds", False):
            return given
        scale = self.guidance(z, cond, guidance) * config.guidance_embeds_scale
        return {**given, "guidance": scale.to(self.dtype)}

    @property
    def text_layers(self) -> tuple[str, ...]:
        return (*super().text_layers, "caption_norm")

    def text_rows(self, tokens: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length width"]:
        return self.network.caption_norm(super().text_rows(tokens))

    def explicit(self, site: Site, listeners: list[Listener], original: Any) -> ExplicitAttention:
        if site.kind == "cross":
            return SanaAttention(site, listeners, original)
        if any(listener.stage == "logits" for listener in listeners):
            raise BadInput(
                f"the self attention of a {self.name} is linear and has no logits: "
                'use the stage "probs" or "kv", or the kind "cross"'
            )
        return SanaLinearAttention(site, listeners, original)
