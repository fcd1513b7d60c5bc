"""A U-Net of the views of a scene: convolutions within each view, attention across them, told of slots and cameras."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.data.cameras import directions
from sfumato.errors import BadInput

from .blocks import Attention, Down, Embedding, MapAttention, ResBlock, Up, group_norm, zeroed
from .rays import pose_encoding, ray_map
from .variation_uvit import CrossAttention

Heard = tuple[
    Float[Tensor, "batch slot width"], Bool[Tensor, "batch slot"], Float[Tensor, "batch view 4 4"],
    Float[Tensor, "batch view"],
]  # fmt: skip
"""Slots, which of them are there, and the cameras' poses and focal lengths in the slots' frame."""


class ViewAttention(nn.Module):
    """Attention of every place to the same place in all views, as a residual; views have no order."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.norm, self.attention = group_norm(channels), Attention(channels, head_dim)

    def forward(self, x: Float[Tensor, "all channels height width"], views: int) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.norm(x).unflatten(0, (-1, views)).permute(0, 3, 4, 1, 2).flatten(0, 2)  # [place, view, channel]
        out = self.attention(tokens).unflatten(0, (-1, height, width))
        return x + out.permute(0, 3, 4, 1, 2).flatten(0, 1)


class Seeing(nn.Module):
    """A residual block and, where the feature map is small, attention: within a view, across views, to the slots."""

    def __init__(self, channels: int, embedding: int, head_dim: int, skip: int, dropout: float | None, attends: bool):
        super().__init__()
        self.block = ResBlock(channels, embedding, dropout, skip)
        self.within = MapAttention(channels, head_dim) if attends else None
        self.across = ViewAttention(channels, head_dim) if attends else None
        self.slots = CrossAttention(channels, embedding, head_dim) if attends else None

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor, there: Tensor, views: int, across: bool) -> Tensor:
        x = self.block(x, emb)
        if self.within is None or self.across is None or self.slots is None:
            return x
        x = self.within(x)
        x = self.across(x, views) if across else x
        flat = x.flatten(2).mT
        return (flat + self.slots(flat, tokens, there)).mT.unflatten(2, x.shape[-2:])


class ViewUNet(ModelMixin, ConfigMixin):
    """DORSal's network (arXiv:2306.08068): Video Diffusion's U-Net without an order of frames, told of slots.

    Two ways lead from the condition into every view: its embedding, the sum of those of log-SNR, camera and the mean of
    the slots, modulates residual blocks (FiLM); and feature maps attend to the slots and to the view's camera. What is
    not there is in neither. Views are a set of any size, one included. It returns 0 when it is new; and what it is
    told, and the other views, change nothing before it has learned.

    Args:
        size: side of the views in pixels, divisible by 2^(levels - 1).
        slot_width: numbers of a slot.
        in_channels: channels of a view, in and out.
        channels: channels of the levels, each at half the side of the one before.
        layers: residual blocks a level on the way down, and again on the way up.
        attention_from: the largest side of feature maps that attend.
        head_dim: channels of an attention head.
        embedding: width of the embedding, and of slots as they are attended to.
        octaves, first_octave: of the encoding of cameras and rays (positions from ``first_octave`` on).
        rays: channels that the map of rays enters with, beside the noisy view; 0 for none.
        across: attend across views; otherwise each is alone, a model per view.
        dropout: in the residual blocks of the last level.

    Raises:
        BadInput: a size or a number of channels that does not divide.
    """

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        slot_width: int = 18,
        in_channels: int = 3,
        channels: tuple[int, ...] = (32, 64, 128),
        layers: int = 2,
        attention_from: int = 16,
        head_dim: int = 32,
        embedding: int = 128,
        octaves: int = 15,
        first_octave: int = -5,
        rays: int = 32,
        across: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if size % 2 ** (len(channels) - 1):
            raise BadInput(f"{len(channels)} levels do not divide a side of {size} pixels")
        if any(width % min(width, head_dim) for width in channels):
            raise BadInput(f"channels {tuple(channels)} are not whole heads of {head_dim}: choose another head_dim")
        self.embed = Embedding(embedding)
        self.pose = nn.Sequential(nn.Linear(18 * octaves, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.norm_slots = nn.LayerNorm(slot_width)
        self.no_slots = nn.Parameter(0.3 * torch.randn(slot_width))
        self.pooled = nn.Sequential(nn.Linear(slot_width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.token = nn.Sequential(nn.Linear(slot_width, embedding), nn.LayerNorm(embedding))
        self.pose_token = nn.Linear(embedding, embedding)
        self.ray_map = zeroed(nn.Conv2d(12 * octaves, rays, 1)) if rays else None
        self.enter = nn.Conv2d(in_channels + rays, channels[0], 3, padding=1)
        sides = [size >> i for i in range(len(channels))]
        level = lambda width, side, skip=0, drop=None: nn.ModuleList(
            Seeing(width, embedding, head_dim, 0 if i else skip, drop, side <= attention_from) for i in range(layers)
        )
        ends = list(zip(channels, sides, strict=True))
        self.down = nn.ModuleList(level(width, side) for width, side in ends[:-1])
        self.middle = level(*ends[-1], drop=dropout)
        self.up = nn.ModuleList(level(width, side, skip=width) for width, side in ends[:-1])
        self.lower = nn.ModuleList(Down(wide, narrow) for wide, narrow in pairwise(channels))
        self.raise_ = nn.ModuleList(Up(narrow, wide) for wide, narrow in pairwise(channels))
        last = zeroed(nn.Conv2d(channels[0], in_channels, 3, padding=1))
        self.leave = nn.Sequential(group_norm(channels[0]), nn.SiLU(), last)

    def forward(
        self,
        z: Float[Tensor, "batch view channel height width"],
        logsnr: Float[Tensor, "batch view"],
        heard: Heard,
    ) -> Float[Tensor, "batch view channel height width"]:
        """See `sfumato.nets`; in place of class numbers it is told ``heard``.

        Raises:
            BadInput: as many cameras as views there must be.
        """
        slots, there, poses, focal = heard
        batch, views = z.shape[:2]
        if poses.shape[:2] != (batch, views):
            raise BadInput(f"cameras {list(poses.shape[:2])} for views {[batch, views]} of scenes: give one for each")
        camera = self.pose(pose_encoding(poses, self.config["octaves"], self.config["first_octave"]))
        slots = self.norm_slots(slots)
        told = camera + self.pooled(self._mean(slots, there))[:, None]
        emb = self.embed(logsnr.flatten(), None) + F.silu(told).flatten(0, 1)
        tokens = self.token(slots)[:, None].expand(-1, views, -1, -1)
        tokens = torch.cat([tokens, self.pose_token(camera)[:, :, None]], dim=2)
        seen = torch.cat([there, there.new_ones(batch, 1)], dim=1).repeat_interleave(views, 0)
        all_told = (emb, tokens.flatten(0, 1), seen[:, None, None], views, self.config["across"])
        x = z.flatten(0, 1)
        if self.ray_map is not None:
            x = torch.cat([x, self._rays(poses, focal, z.shape[-1])], dim=1)
        x, over = self.enter(x), []
        for blocks, lower in zip(self.down, self.lower, strict=True):
            x = through(blocks, x, all_told)
            over.append(x)
            x = lower(x)
        x = through(self.middle, x, all_told)
        for blocks, rise in zip(reversed(self.up), reversed(self.raise_), strict=True):
            x = through(blocks, torch.cat([rise(x), over.pop()], dim=1), all_told)
        return self.leave(x).unflatten(0, (batch, views))

    def _mean(self, slots: Tensor, there: Tensor) -> Float[Tensor, "batch width"]:
        """The mean of the slots that are there; of none, a vector of its own."""
        count = there.sum(1, keepdim=True)
        mean = torch.where(there[..., None], slots, 0.0).sum(1) / count.clamp(min=1)
        return torch.where(count > 0, mean, self.no_slots.to(mean))

    def _rays(self, poses: Tensor, focal: Tensor, side: int) -> Float[Tensor, "all rays height width"]:
        encoded = ray_map(
            poses[..., :3, 3], directions(poses, focal, side), self.config["octaves"], self.config["first_octave"]
        )
        assert self.ray_map is not None
        return self.ray_map(encoded.flatten(0, 1))


def through(blocks: nn.ModuleList, x: Tensor, told: tuple) -> Tensor:
    """``x`` through blocks, all of which are told the same."""
    for block in blocks:
        x = block(x, *told)
    return x
