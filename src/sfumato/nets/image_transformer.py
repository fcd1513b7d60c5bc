"""A causal transformer (minGPT's) of a layout's tokens and the codes of a picture that follow them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of the tokens before, of every block."""


class CausalAttention(nn.Module):
    """Every token hears itself and those before it."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch token width"], past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "batch token width"], tuple[Tensor, Tensor]]:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        new, whole = q.shape[2], k.shape[2]
        mask = None  # one new token hears all
        if past is not None and new > 1:
            mask = torch.ones(new, whole, dtype=torch.bool, device=x.device).tril(whole - new)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=past is None and new > 1
        )
        return self.drop(self.proj(y.transpose(1, 2).flatten(2))), (k, v)


class CausalBlock(nn.Module):
    """Attention and a feed-forward of four times the width, each behind its layer norm."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(
        self, x: Float[Tensor, "batch token width"], past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "batch token width"], tuple[Tensor, Tensor]]:
        heard, kept = self.attention(self.norm1(x), past)
        x = x + heard
        return x + self.mlp(self.norm2(x)), kept


class ImageTransformer(ModelMixin, ConfigMixin):
    """Logits of the token that follows, for every token, from it and all before it.

    The defaults have 339 159 744 parameters.

    Args:
        vocabulary: tokens that there are.
        values: tokens that may follow: the first so many.
        length: tokens of the longest sequence.
        width, depth, heads: channels, blocks, and heads of attention.
        dropout: of embeddings, attention and residuals.
    """

    @register_to_config
    def __init__(
        self,
        vocabulary: int = 8192,
        values: int = 8192,
        length: int = 348,
        width: int = 1056,
        depth: int = 24,
        heads: int = 12,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.zeros(1, length, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, values, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token values"]:
        """Logits of what follows each token."""
        return self.follow(tokens)[0]

    def follow(
        self, tokens: Int[Tensor, "batch token"], past: Past | None = None
    ) -> tuple[Float[Tensor, "batch token values"], Past]:
        """The same for tokens that come after those of ``past``, and what the next call is to be given as past."""
        before = past[0][0].shape[2] if past else 0
        x = self.drop(self.token(tokens) + self.place[:, before : before + tokens.shape[1]])
        kept: Past = []
        for i, block in enumerate(self.blocks):
            x, own = block(x, past[i] if past else None)
            kept.append(own)
        return self.head(self.norm(x)), kept
