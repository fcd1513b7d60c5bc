"""The U-ViT of simple diffusion, told what a frozen encoder sees in a picture: Semantica's network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .blocks import Down, Embedding, RMSNorm, TransformerBlock, Up, run, zeroed
from .simple_uvit import Levels, check_side
from .wavelet import Entry, Exit, Front

Heard = tuple[Float[Tensor, "batch whole"], Bool[Tensor, "batch"], Float[Tensor, "batch token width"] | None]
"""What was seen of the whole, whether there is a picture, and what was seen in its places."""


class CrossAttention(nn.Module):
    """Attention from feature maps to what was seen, with normalised queries and keys; fresh, it returns zeros."""

    def __init__(self, channels: int, seen: int, head_dim: int):
        super().__init__()
        self.head_dim = min(head_dim, channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(seen, 2 * channels)
        self.norm_q, self.norm_k = (RMSNorm(self.head_dim, eps=1e-6) for _ in range(2))
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        seen: Float[Tensor, "batch places seen"],
        there: Bool[Tensor, "batch heads tokens places"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """``there``: which places are attended to, to be broadcast; by default all."""
        q = self.q(self.norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = self.kv(seen).unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, there)
        return self.out(out.transpose(1, 2).flatten(2))


class Looking(nn.Module):
    """A transformer block, and behind it a look at what was seen."""

    def __init__(self, channels: int, embedding: int, head_dim: int, dropout: float | None, looks: bool):
        super().__init__()
        self.block = TransformerBlock(channels, embedding, head_dim, dropout)
        self.cross = CrossAttention(channels, channels, head_dim) if looks else None

    def forward(self, x: Tensor, emb: Tensor, seen: Tensor | None) -> Tensor:
        x = self.block(x, emb)
        return x if self.cross is None else x + self.cross(x, seen)


class VariationUViT(ModelMixin, ConfigMixin):
    """`SimpleUViT` that is told of a picture: its vector joins the log-SNR's, its places are attended to.

    Args:
        whole: numbers that describe all of a picture.
        tokens: places that are described one by one, 0 for none (the picture's vector is all it is told).
        token_width: numbers that describe one place.
        size, in_channels, channels, blocks, depth, width, head_dim, embedding, dropout, dropout_from, factor, front:
            as `SimpleUViT`.

    Fresh, it returns zeros; and what it was shown changes nothing before it has learned.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        in_channels: int = 3,
        whole: int = 128,
        tokens: int = 0,
        token_width: int = 0,
        channels: tuple[int, ...] = (64,),
        blocks: tuple[int, ...] = (2,),
        depth: int = 6,
        width: int = 256,
        head_dim: int = 64,
        embedding: int = 256,
        dropout: float = 0.0,
        dropout_from: int = 16,
        factor: int = 1,
        front: Front = "5/3",
    ):
        super().__init__()
        check_side(size, factor << len(channels))
        self.gradient_checkpointing = False
        self.embed = Embedding(embedding)
        self.norm_whole, self.project_whole = nn.LayerNorm(whole), nn.Linear(whole, embedding)
        self.no_whole = nn.Parameter(0.3 * torch.randn(whole))
        if tokens:
            self.norm_tokens, self.project_tokens = nn.LayerNorm(token_width), nn.Linear(token_width, width)
            self.no_token = nn.Parameter(0.3 * torch.randn(token_width))
        self.entry = Entry(in_channels, channels[0], factor, front)
        side, bottom = size // factor, (size // factor) >> len(channels)
        self.levels = Levels(side, tuple(channels), tuple(blocks), embedding, dropout, dropout_from)
        self.smaller, self.larger = Down(channels[-1], width), Up(width, channels[-1])
        drop = dropout if bottom <= dropout_from else None
        self.place = nn.Parameter(torch.zeros(bottom * bottom, width))
        self.looking = nn.ModuleList(Looking(width, embedding, head_dim, drop, bool(tokens)) for _ in range(depth))
        self.exit = Exit(channels[0], in_channels, factor, front)

    def forward(
        self,
        z: Float[Tensor, "batch channel height width"],
        logsnr: Float[Tensor, "batch"],
        heard: Heard,
    ) -> Float[Tensor, "batch channel height width"]:
        """See `sfumato.nets`; in place of class numbers it is told ``heard``."""
        whole, given, tokens = heard
        whole = torch.where(given[:, None], whole, self.no_whole.to(whole))
        emb = self.embed(logsnr, None) + F.silu(self.project_whole(self.norm_whole(whole)))
        seen = None
        if self.config["tokens"]:
            tokens = torch.where(given[:, None, None], tokens, self.no_token.to(tokens))
            seen = self.project_tokens(self.norm_tokens(tokens))
        x, skips = self.levels.descend(self.entry(z), emb)
        x = self.smaller(x)
        blocks = (lambda h, e, b=block: b(h, e, seen) for block in self.looking)
        flat = run(blocks, x.flatten(2).mT + self.place, emb, self.gradient_checkpointing)
        x = self.larger(flat.mT.unflatten(2, x.shape[-2:]))
        return self.exit(self.levels.ascend(x, skips, emb))
