"""A transformer of tokens: what each of them was before noise, from all of them, the time and the class."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

from .blocks import Embedding, TransformerBlock, zeroed


class TokenTransformer(ModelMixin, ConfigMixin):
    """Attention among all tokens; time and class modulate every block. Fresh, all values are alike likely.

    Args:
        states: values that a token may have, the mask included.
        values: those that it may have been.
        length: tokens of a sample.
        classes: number of classes, 0 for none; class number ``classes`` then means "none".
        width, depth, head_dim: channels, blocks, and channels of a head.
        embedding: width of the embedding of time and class.
        dropout: in the blocks.
    """

    @register_to_config
    def __init__(
        self,
        states: int = 33,
        values: int = 32,
        length: int = 256,
        classes: int = 0,
        width: int = 128,
        depth: int = 4,
        head_dim: int = 32,
        embedding: int = 128,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.embed, self.token = Embedding(embedding, classes), nn.Embedding(states, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, embedding, head_dim, dropout) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), zeroed(nn.Linear(width, values))

    def forward(
        self, x: Int[Tensor, "batch *dims"], t: Float[Tensor, "batch"], labels: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch *dims values"]:
        """Logits for tokens ``x`` at times ``t`` in [0, 1]."""
        emb = self.embed(20.0 - 40.0 * t, labels)  # whose sinusoids see 1000 t
        h = self.token(x.flatten(1)) + self.place
        for block in self.blocks:
            h = block(h, emb)
        return self.out(self.norm(h)).unflatten(1, x.shape[1:])
