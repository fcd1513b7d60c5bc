"""A U-Net of frames: convolutions within each frame, attention across the frames, each frame with its own log-SNR."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.errors import BadInput

from .blocks import Attention, Down, Embedding, MapAttention, ResBlock, Up, group_norm, zeroed


class FrameAttention(nn.Module):
    """Attention of every place to the same place in all frames, as a residual modulated by each frame's embedding.

    Queries and keys turn with the frame (arXiv:2104.09864), so that it is the distance in time that counts.
    """

    def __init__(self, channels: int, frames: int, embedding: int, head_dim: int):
        super().__init__()
        self.norm, self.attention = group_norm(channels), Attention(channels, head_dim)
        self.modulation = zeroed(nn.Linear(embedding, 2 * channels))
        pairs = self.attention.head_dim // 2
        turns = torch.arange(frames)[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, x: Float[Tensor, "all channels height width"], emb: Float[Tensor, "all width"]) -> Tensor:
        frames, (height, width) = len(self.turns), x.shape[-2:]
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(x) * (1 + scale) + shift
        tokens = h.unflatten(0, (-1, frames)).permute(0, 3, 4, 1, 2).flatten(0, 2)  # [batch place, frame, channel]
        out = self.attention(tokens, self.turns.to(tokens.dtype))
        return x + out.unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2).flatten(0, 1)


class VideoUNet(ModelMixin, ConfigMixin):
    """Residual blocks frame by frame, attention across frames at every level, and within frames at the last.

    What arXiv:2402.09470 asks of a network: a time per frame (FiLM and AdaLN by each frame's own log-SNR, clean
    context included), and to know the frame's place in the window (a learned vector). It returns 0 when it is new.

    Args:
        size: side of the frames in pixels, divisible by patch * 2^(levels - 1).
        frames: frames of the window; always so many.
        in_channels: channels of a frame, in and out.
        classes: number of classes, 0 for none; class number ``classes`` then means "none".
        channels: channels of the levels, each at half the side of the one before.
        layers: residual blocks a level on the way down, and again on the way up.
        patch: side of the squares of pixels that become one place.
        head_dim: channels of an attention head.
        embedding: width of the embedding of log-SNR, place and class.
        dropout: in the residual blocks of the last level.
        periodic: frames wrap around at their borders, as a flow on a torus does.

    Raises:
        BadInput: a size or a number of channels that does not divide.
    """

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        frames: int = 8,
        in_channels: int = 3,
        classes: int = 0,
        channels: tuple[int, ...] = (64, 128, 256),
        layers: int = 2,
        patch: int = 1,
        head_dim: int = 32,
        embedding: int = 256,
        dropout: float = 0.0,
        periodic: bool = False,
    ):
        super().__init__()
        if size % (patch * 2 ** (len(channels) - 1)):
            raise BadInput(f"{len(channels)} levels of patches of {patch} do not divide a side of {size} pixels")
        if any(width % min(width, head_dim) for width in channels):
            raise BadInput(f"channels {tuple(channels)} are not whole heads of {head_dim}: choose another head_dim")
        self.embed = Embedding(embedding, classes)
        self.place = nn.Parameter(0.3 * torch.randn(frames, embedding))
        self.enter = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.lower, self.raise_ = nn.ModuleList(), nn.ModuleList()
        for width in channels[:-1]:
            self.down.append(self._level(width, layers))
            self.up.append(self._level(width, layers, skip=width))
        for width, narrow in pairwise(channels):
            self.lower.append(Down(width, narrow))
            self.raise_.append(Up(narrow, width))
        self.middle = nn.ModuleList(
            [
                *self._level(channels[-1], layers, dropout=dropout),
                MapAttention(channels[-1], head_dim),
                *self._level(channels[-1], layers, dropout=dropout),
            ]
        )
        last = zeroed(nn.Conv2d(channels[0], in_channels * patch**2, 3, padding=1))
        self.leave = nn.Sequential(group_norm(channels[0]), nn.SiLU(), last)
        if periodic:
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
                    layer.padding_mode = "circular"

    def _level(self, width: int, layers: int, skip: int = 0, dropout: float | None = None) -> nn.ModuleList:
        """Residual blocks, each followed by attention across frames; the first takes what comes over."""
        config, blocks = self.config, nn.ModuleList()
        for i in range(layers):
            blocks.append(ResBlock(width, config.embedding, dropout, skip=0 if i else skip))
            blocks.append(FrameAttention(width, config.frames, config.embedding, config.head_dim))
        return blocks

    def forward(
        self,
        z: Float[Tensor, "batch frame channel height width"],
        logsnr: Float[Tensor, "batch frame"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch frame channel height width"]:
        """See `sfumato.nets`."""
        batch, frames = z.shape[:2]
        if frames != self.config.frames:
            raise BadInput(f"this network was made for windows of {self.config.frames} frames, not {frames}")
        labels = None if labels is None else labels.repeat_interleave(frames)
        emb = self.embed(logsnr.flatten(), labels) + self.place.repeat(batch, 1)
        x = self.enter(F.pixel_unshuffle(z.flatten(0, 1), self.config.patch))
        over = []
        for level, lower in zip(self.down, self.lower, strict=True):
            x = through(level, x, emb)
            over.append(x)
            x = lower(x)
        x = through(self.middle, x, emb)
        for level, rise in zip(reversed(self.up), reversed(self.raise_), strict=True):
            x = through(level, torch.cat([rise(x), over.pop()], dim=1), emb)
        return F.pixel_shuffle(self.leave(x), self.config.patch).unflatten(0, (batch, frames))


def through(blocks: nn.ModuleList, x: Tensor, emb: Tensor) -> Tensor:
    """``x`` through blocks, of which those within frames take no embedding when they attend."""
    for block in blocks:
        x = block(x) if isinstance(block, MapAttention) else block(x, emb)
    return x
