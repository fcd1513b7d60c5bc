"""Diffusion transformers with joint attention, of text and picture in one softmax: SD3, Flux and Qwen-Image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from ..conditioning import Conditioning
from .base import foreign
from .dit import Transformer
from .explicit import ExplicitAttention, FusedAttention, JointAttention, Listener, QwenAttention
from .parts import Projection, Site

_TEXT_SIDE = re.compile(r"\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.")
_TEXT_KEYS = re.compile(r"\.attn\.add_[kv]_proj\.")
_TIME_AND_OUTPUT = ("time_text_embed.", "norm_out.", "proj_out.")
_TIME2_AND_OUTPUT = ("time_guidance_embed.", "norm_out.", "proj_out.")


class SD3Anatomy(Transformer):
    """``SD3Transformer2DModel``: joint attention (``attn``); in some blocks of SD 3.5 the picture's own (``attn2``)."""

    subsets: ClassVar = {
        "xattn": lambda name: bool(_TEXT_SIDE.search(name)),
        "xattn-strict": lambda name: bool(_TEXT_KEYS.search(name)),
        "noxattn": lambda name: not _TEXT_SIDE.search(name) and not name.startswith(_TIME_AND_OUTPUT),
        "selfattn": lambda name: ".attn2." in name,
    }

    def sites(self) -> list[Site]:
        where = {"attn": "joint", "attn2": "self"}
        found = []
        for block in self.blocks():
            for name, kind in where.items():
                module = getattr(self.network.get_submodule(block), name, None)
                if module is not None:
                    found.append(Site(f"{block}.{name}", kind, self.resolution, module, self.context))
        return found

    readers: ClassVar[Mapping[str, str]] = {
        "context_embedder": "text.in", "time_text_embed.text_embedder.linear_1": "pooled.in"
    }  # fmt: skip
    """The linear maps that read the text encoders' embeddings, with their kinds."""

    def every_projection(self) -> list[Projection]:
        found = [Projection(n, kind, self.network.get_submodule(n), 0) for n, kind in self.readers.items()]
        for site in self.sites():
            names = {f"{site.kind}.{what}": f"to_{what}" for what in ("q", "k", "v")}
            names |= {f"{site.kind}.out": "to_out.0"}
            names |= {f"text.{what}": f"add_{what}_proj" for what in ("q", "k", "v")}
            names |= {"text.out": "to_add_out"}
            for kind, name in names.items():
                if (module := _part(site.module, name)) is not None:
                    found.append(Projection(f"{site.name}.{name}", kind, module, site.resolution))
        return found

    def explicit(self, site: Site, listeners: list[Listener], original: Any) -> JointAttention:
        return JointAttention(site, listeners, original)

    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        dtype = self.dtype
        return {"encoder_hidden_states": cond.tokens.to(dtype), "pooled_projections": cond.pooled.to(dtype)}

    def conditioning(self, inputs: dict[str, Any]) -> Conditioning:
        return foreign(inputs["encoder_hidden_states"], pooled=inputs.get("pooled_projections"))

    def retold(self, inputs: dict[str, Any], cond: Conditioning) -> dict[str, Any]:
        told, pooled = super().retold(inputs, cond), inputs.get("pooled_projections")
        if cond.pooled is None or pooled is None:
            return told
        return {**told, "pooled_projections": cond.pooled.to(pooled)}


class FluxAnatomy(SD3Anatomy):
    """``FluxTransformer2DModel``: blocks of two streams, then of one; rotary positions; packed latents.

    Args:
        side: of the latent at the default picture size, which the network's configuration does not say.
    """

    trunks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    default_guidance = 3.5

    def __init__(self, network: nn.Module, side: int = 128):
        super().__init__(network)
        self._side = side

    @property
    def channels(self) -> int:
        return self.network.config.in_channels // 4

    @property
    def side(self) -> int:
        return self._side

    @property
    def resolution(self) -> int:
        return self.side // 2

    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        given = super().inputs(z, cond)
        height, width = (side // 2 for side in z.shape[-2:])
        kind = {"device": z.device, "dtype": self.dtype}
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        given["img_ids"] = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(**kind)
        given["txt_ids"] = torch.zeros(cond.tokens.shape[1], 3, **kind)
        if self.network.config.guidance_embeds:
            given["guidance"] = self.guidance(z, cond, guidance)
        return given

    def conditioning(self, inputs: dict[str, Any]) -> Conditioning:
        return super().conditioning(inputs).replace(guidance=inputs.get("guidance"))

    def packed(self, z: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch patch four_channels"]:
        """Every 2x2 patch as one row, channels outermost in it.

        Raises:
            BadInput: an odd side.
        """
        if z.shape[-1] % 2 or z.shape[-2] % 2:
            raise BadInput(f"a latent of {z.shape[-2]}x{z.shape[-1]} cannot be packed: both sides must be even")
        return z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpacked(self, z: Tensor, inputs: dict[str, Any]) -> Float[Tensor, "batch channel height width"]:
        ids = inputs["img_ids"]
        height, width = (int(ids[..., axis].max()) + 1 for axis in (1, 2))
        return _unpacked(z, height, width)

    def prediction(self, out: Tensor, z: Tensor) -> Float[Tensor, "batch channel height width"]:
        return _unpacked(out, z.shape[-2] // 2, z.shape[-1] // 2)

    def result(self, prediction: Tensor, out: Tensor | None) -> Tensor:
        return self.packed(prediction)


class QwenAnatomy(FluxAnatomy):
    """``QwenImageTransformer2DModel``: blocks of two streams; a mask for the text; latents packed as Flux's.

    "text.in" reads the embeddings after a norm (``txt_norm``).
    """

    trunks = ("transformer_blocks",)
    readers: ClassVar = {"txt_in": "text.in"}

    def explicit(self, site: Site, listeners: list[Listener], original: Any) -> QwenAttention:
        return QwenAttention(site, listeners, original)

    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        # As the pipeline does it: as long as the longest, and without a mask where nothing is masked.
        length = cond.mask.shape[1] if cond.mask.is_meta else max(1, int(cond.mask.sum(dim=1).max()))
        mask = cond.mask[:, :length]
        return {
            "encoder_hidden_states": cond.tokens[:, :length].to(self.dtype),
            "encoder_hidden_states_mask": None if mask.is_meta or bool(mask.all()) else mask,
            "img_shapes": [[(1, z.shape[-2] // 2, z.shape[-1] // 2)]] * len(z),
        }

    def conditioning(self, inputs: dict[str, Any]) -> Conditioning:
        return foreign(inputs["encoder_hidden_states"], inputs.get("encoder_hidden_states_mask"))

    def unpacked(self, z: Tensor, inputs: dict[str, Any]) -> Float[Tensor, "batch channel height width"]:
        _, height, width = inputs["img_shapes"][0][0]
        return _unpacked(z, height, width)


class Flux2Anatomy(FluxAnatomy):
    """``Flux2Transformer2DModel``: blocks of two streams, then of one, whose projections are fused with feed-forward.

    The single blocks have places of attention, but no projections of their own kind: ``to_qkv_mlp_proj`` and ``to_out``
    are reached by the adapter target "transformer" and by name. Padding of the text is seen, as by diffusers.
    """

    default_guidance = 4.0
    readers: ClassVar = {"context_embedder": "text.in"}
    subsets: ClassVar = {
        **SD3Anatomy.subsets,
        "noxattn": lambda name: not _TEXT_SIDE.search(name) and not name.startswith(_TIME2_AND_OUTPUT),
    }

    @property
    def channels(self) -> int:
        return self.network.config.in_channels

    @property
    def resolution(self) -> int:
        return self.side

    def explicit(self, site: Site, listeners: list[Listener], original: Any) -> ExplicitAttention:
        fused = hasattr(site.module, "to_qkv_mlp_proj")
        return (FusedAttention if fused else JointAttention)(site, listeners, original)

    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        tokens = cond.tokens.to(self.dtype)
        ranges = [torch.arange(n, device=z.device) for n in (1, *z.shape[-2:], 1)]
        words = torch.zeros(tokens.shape[1], 4, dtype=torch.long, device=z.device)
        words[:, 3] = torch.arange(len(words), device=z.device)
        given = {"encoder_hidden_states": tokens, "txt_ids": words, "img_ids": torch.cartesian_prod(*ranges)}
        if self.network.config.guidance_embeds:
            given["guidance"] = self.guidance(z, cond, guidance)
        return given

    def packed(self, z: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch patch channel"]:
        return z.flatten(2).transpose(1, 2)

    def unpacked(self, z: Tensor, inputs: dict[str, Any]) -> Float[Tensor, "batch channel height width"]:
        return z.transpose(1, 2).unflatten(2, (int(inputs["img_ids"][..., 1].max()) + 1, -1))

    def prediction(self, out: Tensor, z: Tensor) -> Float[Tensor, "batch channel height width"]:
        return out.transpose(1, 2).unflatten(2, tuple(z.shape[-2:]))


def _unpacked(z: Tensor, height: int, width: int) -> Float[Tensor, "batch channel height2 width2"]:
    """The inverse of packing, for so many patches."""
    return z.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _part(module: nn.Module, name: str) -> nn.Module | None:
    """A submodule, or None where the layer does without it."""
    found: Any = module
    for step in name.split("."):
        found = getattr(found, step, None)
    return found
