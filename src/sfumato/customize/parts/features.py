"""Patch features of pictures."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import BadInput


@torch.no_grad()
def patches(
    pictures: Float[Tensor, "n 3 height width"], encoder: str = "", batch: int = 32
) -> Float[Tensor, "n h w width"]:
    """Features of the patches of pictures in [0, 1], on the CPU.

    Args:
        encoder: a folder or hub id of one of `transformers`' vision transformers, of which the last layer's patch
            tokens are taken, each picture resized as a whole to the size of its crop; empty: the third layer of the
            sketch world's oracle, 16x16 patches of 48 numbers.

    Raises:
        BadInput: no such model, or one without a square grid of patch tokens.
    """
    if not encoder:
        from sfumato.data.oracle import SIDE, load

        layers = load().trunk[:3]
        resize = lambda x: F.interpolate(x.float(), (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        return torch.cat([layers(resize(x.cpu())) for x in pictures.split(batch)]).permute(0, 2, 3, 1)
    from transformers import AutoModel

    from sfumato.metrics.extractors import whole
    from sfumato.metrics.vision import load_vision

    vision, found = load_vision(encoder, AutoModel), []
    prepare = whole(vision.prepare)  # a crop's patches lie elsewhere than attention's, which masks are held to
    size = getattr(vision.network.config, "patch_size", None)
    for some in pictures.split(batch):
        x = prepare(some.to(vision.device))
        tokens = getattr(vision.network(pixel_values=x), "last_hidden_state", None)
        side = x.shape[-1] // size if isinstance(size, int) else 0
        if tokens is None or tokens.ndim != 3 or not 0 < side**2 <= tokens.shape[1]:
            raise BadInput(f"{encoder} has no grid of patch tokens: take a vision transformer such as DINOv2")
        found.append(tokens[:, -(side**2) :].unflatten(1, (side, side)).float().cpu())
    return torch.cat(found)
