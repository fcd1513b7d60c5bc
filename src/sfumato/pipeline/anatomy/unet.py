"""Conditional U-Nets (``UNet2DConditionModel``): Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from ..conditioning import Conditioning
from .base import Anatomy, attention_pairs, foreign, site_projections
from .parts import Projection, Site

# Parts that ESD-u leaves alone although they are not cross-attention (the published code excludes them by
# name); SDXL's size and pooled-text embedding is added into the time embedding and counts as a part of it.
_TIME_AND_OUTPUT = ("time_embedding.", "add_embedding.", "conv_norm_out.", "conv_out.")


class UNetAnatomy(Anatomy):
    """A U-Net with cross-attention (``attn2``) and self-attention (``attn1``) in its transformer blocks."""

    component = "unet"
    output = UNet2DConditionOutput
    first = "sample"
    subsets: ClassVar = {
        "xattn": lambda name: ".attn2." in name,
        "xattn-strict": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
        "noxattn": lambda name: ".attn2." not in name and not name.startswith(_TIME_AND_OUTPUT),
        "selfattn": lambda name: ".attn1." in name,
    }
    bottleneck = "mid_block"

    @property
    def last(self) -> nn.Module:
        return self.network.conv_out

    @property
    def transformers(self) -> tuple[str, ...]:
        return tuple(n for n, m in self.network.named_modules() if isinstance(m, Transformer2DModel))

    def blocks(self) -> tuple[str, ...]:
        return tuple(self.sides())

    def sides(self) -> dict[str, int]:
        """Feature-map side inside each block ("down_blocks.0", "mid_block", ...), at the default latent size.

        Read off the structure: every stride-2 convolution with padding 1 maps a side s to ceil(s / 2), and an up
        block works at the side of the down block whose skip connections it receives.
        """
        side, sides = self.side, {}
        for i, block in enumerate(self.network.down_blocks):
            sides[f"down_blocks.{i}"] = side
            if block.downsamplers is not None:
                side = -(-side // 2)
        sides["mid_block"] = side
        last = len(self.network.down_blocks) - 1
        for i in range(len(self.network.up_blocks)):
            sides[f"up_blocks.{i}"] = sides[f"down_blocks.{last - i}"]
        return sides

    def sites(self) -> list[Site]:
        sides = self.sides()

        def side(name: str) -> int:
            parts = name.split(".")
            return sides["mid_block"] if parts[0] == "mid_block" else sides[".".join(parts[:2])]

        return attention_pairs(self, side)

    def every_projection(self) -> list[Projection]:
        return [p for site in self.sites() for p in site_projections(site)]

    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        dtype = self.dtype
        given: dict[str, Any] = {"encoder_hidden_states": cond.tokens.to(dtype)}
        if self.network.config.get("addition_embed_type") == "text_time":
            added = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.size_ids.to(dtype)}
            given["added_cond_kwargs"] = added
        return given

    def conditioning(self, inputs: dict[str, Any]) -> Conditioning:
        added = inputs.get("added_cond_kwargs") or {}
        mask = inputs.get("encoder_attention_mask")
        given = {"pooled": added.get("text_embeds"), "size_ids": added.get("time_ids")}
        return foreign(inputs["encoder_hidden_states"], mask, **given)

    def retold(self, inputs: dict[str, Any], cond: Conditioning) -> dict[str, Any]:
        told, added = super().retold(inputs, cond), inputs.get("added_cond_kwargs") or {}
        if cond.pooled is None or "text_embeds" not in added:
            return told
        return {**told, "added_cond_kwargs": {**added, "text_embeds": cond.pooled.to(added["text_embeds"])}}

    def arguments(
        self, z: Tensor, timestep: Tensor | float, inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (z, timestep), inputs
