"""ProSpect's mapper: from the embedding of one word to one embedding for each stage of time (arXiv:2305.16225)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Attention to a context of one row: the softmax over it is 1, so what is left is out(W_v context).

    Its query and key projections would change nothing and get no gradients: they are left out.
    """

    def __init__(self, width: int, heads: int = 8, head_width: int = 64, dropout: float = 0.1):
        super().__init__()
        self.to_v = nn.Linear(width, heads * head_width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_width, width), nn.Dropout(dropout))

    def forward(self, context: Float[Tensor, "batch 1 width"]) -> Float[Tensor, "batch 1 width"]:
        return self.to_out(self.to_v(context))


class GEGLU(nn.Module):
    """The first half of a linear map times the GELU of the second."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch inner"]:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, dropout, a linear map."""

    def __init__(self, width: int, out: int, dropout: float = 0.1):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, out))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        return self.net(x)


class Mapper(nn.Module):
    """One transformer block over a sequence of one row e_0:

        x = e_0;  x = x + A_1(LN x);  x = x + A_2(context = e_0);  P = FF(LN x), without a residual.

    Parameters are named as in the published code, so that ``load_state_dict(published, strict=False)`` takes its
    weights (all but the query and key projections, and the norm before A_2, which feeds nothing but its queries).

    Args:
        start: e_0, the seed word's embedding.
        stages: S.
        dropout: after both attentions and inside the feed-forward part; it acts in training alone.
    """

    def __init__(self, start: Float[Tensor, "width"], stages: int = 10, dropout: float = 0.1):
        super().__init__()
        width = len(start)
        self.stages = stages
        self.register_buffer("start", start.detach().clone()[None, None])
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, dropout=dropout)
        self.attn2 = Attention(width, dropout=dropout)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width, stages * width, dropout)

    def forward(self) -> Float[Tensor, "stages width"]:
        e0: Tensor = self.start
        x = e0 + self.attn1(self.norm1(e0))
        x = x + self.attn2(e0)
        return self.ff(self.norm3(x)).view(self.stages, -1)


def clipped(rows: Float[Tensor, "rows width"], longest: float) -> Float[Tensor, "rows width"]:
    """Rows scaled down to a norm of at most ``longest``; 0: as they are."""
    if not longest:
        return rows
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows * (longest / norm.clamp(min=longest))
