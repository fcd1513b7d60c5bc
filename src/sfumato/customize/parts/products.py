"""Low-rank products on attention, trained beside a frozen network."""

from __future__ import annotations

import torch

from sfumato.pipeline import Text2Image
from sfumato.pipeline.adapter import Adapter
from sfumato.pipeline.lora import Product
from sfumato.train.recipe import Loose


def on_attention(pipe: Text2Image, rank: int, seed: int) -> Adapter:
    """A fresh adapter on every query, key, value and output projection of attention.

    V (down) is normal with a standard deviation of 1 / rank, as diffusers' scripts start it, whose learning rates are
    for that; U (up) is 0.
    """
    kinds, rng = ("q", "k", "v", "out"), torch.Generator().manual_seed(seed)
    targets = [p.name for p in pipe.projections() if p.kind.rpartition(".")[2] in kinds and p.resolution]
    adapter = pipe.add_adapter("lora", rank, rank, targets, rng)
    for down in adapter.down.values():
        down.data.copy_(torch.randn(down.shape, generator=rng) / rank)
    return adapter


def factors(adapter: Adapter) -> Loose:
    """An adapter's factors as the loop trains them."""
    return Loose({f"{name}.{w}": getattr(adapter, w)[name] for w in ("down", "up") for name in adapter.layers})


def products_of(adapter: Adapter) -> dict[str, Product]:
    """What an adapter adds, by layer, on the CPU."""
    cut = lambda x: x.detach().cpu()
    return {n: Product(cut(adapter.down[n]), cut(adapter.up[n]), adapter.alpha) for n in adapter.layers}
