"""The pieces of pixel-space U-Nets and U-ViTs: every block is a residual that is the identity when it is new."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.errors import BadInput

Positions = Literal["learned", "rotary"]
_SINUSOIDS = 256


def zeroed(layer: nn.Module) -> nn.Module:
    """``layer`` with all its parameters set to zero."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def groups(*channels: int) -> int:
    """Groups of normalisations over that many channels: 32, or as many as leave at least four channels in each.

    A channel that is a group of its own loses its mean, and with it goes the brightness of the pictures.
    """
    return math.gcd(*channels, max(1, min(32, min(channels) // 4)))


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation in as many groups as `groups` says."""
    return nn.GroupNorm(groups(channels), channels)


def run(blocks: Iterable[nn.Module], x: Tensor, emb: Tensor | None, save_memory: bool = False) -> Tensor:
    """``x`` through ``blocks``; ``save_memory`` keeps only what enters each and computes the rest twice."""
    for block in blocks:
        again = save_memory and torch.is_grad_enabled()
        x = checkpoint(block, x, emb, use_reentrant=False) if again else block(x, emb)
    return x


class Embedding(nn.Module):
    """Log-SNR and class number as one vector, ready for the blocks' linear layers (SiLU applied)."""

    def __init__(self, width: int, classes: int = 0):
        super().__init__()
        self.sinusoids = Timesteps(_SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.level = TimestepEmbedding(_SINUSOIDS, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.3)  # about as large as the log-SNR's part is at first

    def forward(
        self, logsnr: Float[Tensor, "batch"], labels: Int[Tensor, "batch"] | None
    ) -> Float[Tensor, "batch width"]:
        # Log-SNRs of -20 to 20 fill the range of 0 to 1000 that these sinusoids were made for.
        waves = self.sinusoids(25.0 * (20.0 - logsnr)).to(self.level.linear_1.weight.dtype)
        emb = self.level(waves)
        if self.label is not None:
            emb = emb + self.label(labels)
        return F.silu(emb)


def _dropout(share: float | None) -> nn.Module:
    """Dropout, also of 0, which whoever trains on may change; None: none ever."""
    return nn.Identity() if share is None else nn.Dropout(share)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, modulated (FiLM) by the embedding; ``skip`` more channels may come in on the way up."""

    def __init__(self, channels: int, embedding: int | None, dropout: float | None = None, skip: int = 0):
        super().__init__()
        inside = channels + skip
        self.norm1, self.conv1 = group_norm(inside), nn.Conv2d(inside, channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(channels), zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.film = zeroed(nn.Linear(embedding, 2 * channels)) if embedding else None
        self.dropout = _dropout(dropout)
        self.shortcut = nn.Conv2d(inside, channels, 1) if skip else nn.Identity()

    def forward(self, x: Float[Tensor, "batch inside height width"], emb: Tensor | None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.film is not None:
            scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in its input's precision: in mixed precision torch's own leaves the fused kernel, with a warning."""

    def forward(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys (arXiv:2302.05442, section 2)."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.head_dim = min(head_dim, channels)
        if channels % self.head_dim:
            raise BadInput(f"{channels} channels are not whole heads of {head_dim}: choose another head_dim")
        self.qkv, self.out = nn.Linear(channels, 3 * channels), zeroed(nn.Linear(channels, channels))
        self.norm_q, self.norm_k = (RMSNorm(self.head_dim, eps=1e-6) for _ in range(2))

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], turns: Float[Tensor, "tokens pairs"] | None = None
    ) -> Float[Tensor, "batch tokens channels"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.norm_q(q), self.norm_k(k)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotations(height: int, width: int, head_dim: int, like: Tensor) -> Float[Tensor, "tokens pairs"]:
    """Angles of rotary positions on a grid: half of the pairs of a head turn with the row, half with the column.

    Wavelengths of 6 to 600 tokens (arXiv:2104.09864 for two axes; its 60,000 would waste most pairs on such grids).
    """
    pairs = head_dim // 4
    speed = 100.0 ** -(torch.arange(pairs, device=like.device, dtype=like.dtype) / pairs)
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype)[:, None] * speed for n in (height, width))
    both = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    return torch.cat(both, dim=-1).flatten(0, 1)


def rotate(x: Float[Tensor, "*batch tokens head"], turns: Float[Tensor, "tokens pairs"]) -> Tensor:
    """Each pair (i, i + pairs) of a head turned by its angle; what is left over of an odd-sized head stays."""
    pairs = turns.shape[-1]
    cos, sin = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


class TransformerBlock(nn.Module):
    """Attention, then a perceptron of four times the width, each behind a modulated normalisation (AdaLN)."""

    def __init__(self, channels: int, embedding: int | None, head_dim: int, dropout: float | None = None):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(channels, eps=1e-6, elementwise_affine=not embedding) for _ in range(2))
        self.modulation = zeroed(nn.Linear(embedding, 4 * channels)) if embedding else None
        self.attention = Attention(channels, head_dim)
        drop = _dropout(dropout)
        last = zeroed(nn.Linear(4 * channels, channels))
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), drop, last)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], emb: Tensor | None, turns: Tensor | None = None
    ) -> Float[Tensor, "batch tokens channels"]:
        scale1, shift1, scale2, shift2 = (0, 0, 0, 0)
        if self.modulation is not None:
            scale1, shift1, scale2, shift2 = self.modulation(emb)[:, None].chunk(4, dim=-1)
        x = x + self.attention(self.norm1(x) * (1 + scale1) + shift1, turns)
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    """A plain stack of transformer blocks on a feature map; positions enter once, or turn queries and keys.

    Learned positions belong to grids of ``side``, and begin at zero, so that a new stack is the identity.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        side: int,
        embedding: int | None,
        head_dim: int = 64,
        dropout: float | None = None,
        positions: Positions = "learned",
    ):
        super().__init__()
        self.head_dim = min(head_dim, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, embedding, head_dim, dropout) for _ in range(depth))
        self.place = nn.Parameter(torch.zeros(side * side, channels)) if positions == "learned" and depth else None

    def forward(
        self, x: Float[Tensor, "batch channels height width"], emb: Tensor | None, save_memory: bool = False
    ) -> Float[Tensor, "batch channels height width"]:
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        turns = None
        if self.place is not None:
            tokens = tokens + self.place
        else:
            turns = rotations(height, width, self.head_dim, x)
        blocks = (lambda h, e, b=block: b(h, e, turns) for block in self.blocks)
        return run(blocks, tokens, emb, save_memory).transpose(1, 2).unflatten(2, (height, width))


class Convolutions(nn.Module):
    """A stack of `ResBlock`s with the call of `Transformer`."""

    def __init__(self, channels: int, depth: int, embedding: int | None, dropout: float | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels, embedding, dropout) for _ in range(depth))

    def forward(self, x: Tensor, emb: Tensor | None, save_memory: bool = False) -> Tensor:
        return run(self.blocks, x, emb, save_memory)


class MapAttention(nn.Module):
    """Self-attention between the pixels of a feature map, as a residual: what U-Nets have at 16x16 and 8x8."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.norm, self.attention = group_norm(channels), Attention(channels, head_dim)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        out = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        return x + out.transpose(1, 2).unflatten(2, x.shape[-2:])


class Down(nn.Module):
    """Half the side: the mean of 2x2 pixels, then other channels. Linear, without bias."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.mix = nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out h w"]:
        return self.mix(F.avg_pool2d(x, 2))


class Up(nn.Module):
    """Twice the side: other channels, then every pixel four times. Linear, without bias, so that 0 stays 0."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.mix = nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out h w"]:
        return F.interpolate(self.mix(x), scale_factor=2.0, mode="nearest")
