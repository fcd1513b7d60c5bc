"""Tiny networks of every anatomy, with random weights, and what they are told."""

from __future__ import annotations

import torch

from sfumato.pipeline import Conditioning
from sfumato.pipeline.anatomy import (
    Flux2Anatomy,
    FluxAnatomy,
    PixArtAnatomy,
    QwenAnatomy,
    SanaAnatomy,
    SD3Anatomy,
    UNetAnatomy,
    ZImageAnatomy,
)

LENGTH, WIDTH, POOLED = 5, 16, 12


def unet():
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=WIDTH,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return UNetAnatomy(network)


def pixart():
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        cross_attention_dim=16, caption_channels=WIDTH,
    )  # fmt: skip
    return PixArtAnatomy(network)


def sana():
    from diffusers import SanaTransformer2DModel

    network = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=4, cross_attention_head_dim=4, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=8, timestep_scale=0.001, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    return SanaAnatomy(network)


def sd3(**settings):
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=POOLED, out_channels=4,
        pos_embed_max_size=8, **settings,
    )  # fmt: skip
    return SD3Anatomy(network)


def sd35():
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def flux(guidance_embeds: bool = True):
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return FluxAnatomy(network, side=8)


def qwen():
    from diffusers import QwenImageTransformer2DModel

    network = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return QwenAnatomy(network, side=8)


def flux2():
    from diffusers import Flux2Transformer2DModel

    network = Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=16,
    )  # fmt: skip
    return Flux2Anatomy(network, side=8)


def zimage():
    from diffusers import ZImageTransformer2DModel

    network = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[2, 2, 4], axes_lens=[100, 16, 16],
    )  # fmt: skip
    for name in ("x_pad_token", "cap_pad_token"):  # which are empty until they are loaded
        torch.nn.init.normal_(getattr(network, name))
    return ZImageAnatomy(network, side=8)


MAKERS = {f.__name__: f for f in (unet, pixart, sana, sd3, sd35, flux, qwen, flux2, zimage)}


def make(name: str, dtype: torch.dtype = torch.float32):
    """An anatomy of a network of that name; nothing in it is zero, so that everything acts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        anatomy = MAKERS[name]()
        with torch.no_grad():
            for x in anatomy.network.parameters():
                x.add_(0.1 * torch.randn(x.shape))
    anatomy.network.eval().requires_grad_(False).to(dtype)
    return anatomy


def told(rows: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Conditioning:
    """Random embeddings of prompts, of which the last of each pair is shorter."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, LENGTH, dtype=torch.bool)
    mask[1::2, 3:] = False
    tokens = torch.randn(rows, LENGTH, WIDTH, generator=rng).to(dtype)
    pooled = torch.randn(rows, POOLED, generator=rng).to(dtype)
    return Conditioning(tokens, torch.zeros(rows, LENGTH, dtype=torch.long), mask, pooled)


def latent(anatomy, rows: int = 2, dtype: torch.dtype = torch.float32, shape=(8, 8)) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(rows, anatomy.channels, *shape, generator=rng).to(dtype)


def number(anatomy, timestep: float = 500.0, rows: int = 2) -> torch.Tensor:
    """The network's own number for a scheduler's timestep."""
    scale = 1.0 if anatomy.name.startswith(("UNet", "PixArt", "SD3")) else 0.001
    return torch.full((rows,), timestep) * scale
