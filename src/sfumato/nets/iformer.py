"""iFormer (arXiv:2205.12956): attention for low frequencies beside convolutions and max-pools for high ones.

Maps are channels-last [n, h, w, c] between blocks, and channels-first inside the mixer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

Ramp = Literal["published", "reversed", "constant", "attention", "none"]


@dataclass(frozen=True)
class Plan:
    """One of the nets; of four stages, and attention heads of every block, of the ``heads`` that fill its channels."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    heads: tuple[int, ...]
    attention: tuple[int, ...]


PLANS = {
    "small": Plan(
        (3, 3, 9, 3), (96, 192, 320, 384), (3, 6, 10, 12), (1,) * 3 + (3,) * 3 + (7,) * 4 + (9,) * 5 + (11,) * 3
    ),
    "base": Plan(
        (4, 6, 14, 6), (96, 192, 384, 512), (3, 6, 12, 16), (1,) * 4 + (3,) * 6 + (8,) * 7 + (10,) * 7 + (15,) * 6
    ),
    "large": Plan(
        (4, 6, 18, 8), (96, 192, 448, 640), (3, 6, 14, 20), (1,) * 4 + (3,) * 6 + (10,) * 9 + (12,) * 9 + (19,) * 8
    ),
}  # fmt: skip


def ramped(plan: Plan, ramp: Ramp) -> tuple[int, ...]:
    """Attention heads of every block: as published, or for the ablations in other shares of the channels.

    "reversed" gives block i the share of the i-th from the end, "constant" the mean share of all blocks, each rounded
    to heads (reconstructed: the paper does not print its numbers); "attention" gives all channels, "none" none.
    """
    heads = [heads for heads, depth in zip(plan.heads, plan.depths, strict=True) for _ in range(depth)]
    if ramp == "published":
        return plan.attention
    if ramp in ("attention", "none"):
        return tuple(heads) if ramp == "attention" else (0,) * len(heads)
    shares = [a / h for a, h in zip(plan.attention, heads, strict=True)]
    shares = shares[::-1] if ramp == "reversed" else [sum(shares) / len(shares)] * len(shares)
    return tuple(round(share * h) for share, h in zip(shares, heads, strict=True))


def halves(channels: int, heads: int, attention: int) -> tuple[int, int]:
    """How many channels are high and how many low.

    Raises:
        BadInput: heads do not divide the channels, there are fewer than attend, or an odd number is left for high.
    """
    if channels % heads or not 0 <= attention <= heads:
        raise BadInput(f"{channels} channels in {heads} heads cannot have {attention} attend: give a share of them")
    low = attention * (channels // heads)
    if (channels - low) % 2:
        raise BadInput(f"{channels - low} channels without attention cannot be halved: let an even number be left")
    return channels - low, low


def blocks_of(plan: Plan, ramp: Ramp) -> list[list[tuple[int, int, int]]]:
    """Channels, heads and attention heads of every block of every stage.

    Raises:
        BadInput: there is no such net; as `halves`.
    """
    if len(plan.attention) != sum(plan.depths):
        raise BadInput(f"{sum(plan.depths)} blocks have heads for {len(plan.attention)}: give one number for each")
    attention = iter(ramped(plan, ramp))
    stages = zip(plan.depths, plan.dims, plan.heads, strict=True)
    made = [[(dim, heads, next(attention)) for _ in range(depth)] for depth, dim, heads in stages]
    for block in (block for stage in made for block in stage):
        halves(*block)
    return made


class Mixer(nn.Module):
    """Three ways through a map, fused: out(y + fuse(y)), y the outputs of the ways side by side.

    The first channels are "high", the last ``attention`` of ``heads`` parts "low". The first half of high goes through
    1x1, depthwise 3x3 and GELU, the second through a max-pool of 3x3, 1x1 and GELU; both double their width. Low is
    averaged over ``pool`` x ``pool``, attends, and is repeated to the size it had; it has no projection of its own.
    """

    def __init__(self, channels: int, heads: int, attention: int, pool: int = 1):
        super().__init__()
        self.attention, self.pooled = attention, pool
        self.high, self.low = halves(channels, heads, attention)
        half, wide = self.high // 2, self.low + 2 * self.high
        self.conv = self.pool = self.qkv = None
        if half:
            depthwise = nn.Conv2d(self.high, self.high, 3, 1, 1, groups=self.high, bias=False)
            self.conv = nn.Sequential(nn.Conv2d(half, self.high, 1, bias=False), depthwise, nn.GELU())
            self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(half, self.high, 1), nn.GELU())
        if self.low:
            self.qkv = nn.Linear(self.low, 3 * self.low)
        self.fuse = nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False)
        self.out = nn.Conv2d(wide, channels, 1)

    def attend(self, x: Float[Tensor, "n low h w"]) -> Float[Tensor, "n low h w"]:
        """The low way."""
        assert self.qkv is not None
        height, width = x.shape[-2:]
        if self.pooled > 1:  # at odd sides the last window is smaller
            x = F.avg_pool2d(x, self.pooled, ceil_mode=True, count_include_pad=False)
        rows, columns = x.shape[-2:]
        q, k, v = self.qkv(x.flatten(2).mT).unflatten(-1, (3, self.attention, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).mT.reshape(len(x), self.low, rows, columns)
        if self.pooled > 1:
            y = F.interpolate(y, scale_factor=float(self.pooled), mode="nearest")[..., :height, :width]
        return y

    def ways(self, x: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n d h w"]]:
        """What comes of each way that there is: "conv", "pool", "attention"."""
        found = {}
        if self.conv is not None and self.pool is not None:
            half = self.high // 2
            found = {"conv": self.conv(x[:, :half]), "pool": self.pool(x[:, half : self.high])}
        if self.qkv is not None:
            found["attention"] = self.attend(x[:, self.high :])
        return found

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h w c"]:
        y = torch.cat(list(self.ways(x.permute(0, 3, 1, 2)).values()), dim=1)
        return self.out(y + self.fuse(y)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """x + g1 mixer(norm(x)), then x + g2 mlp(norm(x)), each left out of a picture with the chance ``drop``."""

    def __init__(
        self, channels: int, heads: int, attention: int, pool: int, drop: float = 0.0, scale: float | None = None
    ):  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(channels, eps=1e-6) for _ in range(2))
        self.mixer, self.drop = Mixer(channels, heads, attention, pool), drop
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.scale1, self.scale2 = (
            None if scale is None else nn.Parameter(torch.full((channels,), scale)) for _ in range(2)
        )

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h w c"]:
        x = x + self._kept(self.mixer(self.norm1(x)), self.scale1)
        return x + self._kept(self.mlp(self.norm2(x)), self.scale2)

    def _kept(self, y: Tensor, scale: Tensor | None) -> Tensor:
        y = y if scale is None else scale * y
        if not self.training or not self.drop:
            return y
        kept = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop
        return y * kept.to(y.dtype) / (1 - self.drop)


class Stage(nn.Module):
    """A smaller map with its places added, and its blocks."""

    def __init__(self, embed: nn.Sequential, channels: int, side: int, blocks: Sequence[Block]):
        super().__init__()
        self.embed, self.blocks = embed, nn.Sequential(*blocks)
        self.place = nn.Parameter(torch.zeros(1, side, side, channels))

    def enter(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n h2 w2 d"]:
        """What the first block sees; the table of places is resized where the map has another size."""
        x, place = self.embed(x).permute(0, 2, 3, 1), self.place
        if x.shape[1:3] != place.shape[1:3]:
            resized = F.interpolate(place.permute(0, 3, 1, 2), x.shape[1:3], mode="bilinear", align_corners=False)
            place = resized.permute(0, 2, 3, 1)
        return x + place

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        return self.blocks(self.enter(x)).permute(0, 3, 1, 2)


class IFormer(nn.Module):
    """One of `PLANS`, or another plan, from standardised pictures of 3 channels to logits.

    Args:
        plan: its name, or depths, channels and heads.
        classes: logits.
        size: side of the pictures that the tables of places are made for; others are taken too.
        ramp: as `ramped`.
        drop_path: chance that the last block's residuals are left out; it rises linearly from 0.
        layer_scale: g1 and g2 of stages 3 and 4 at first; stages 1 and 2 have none.
        small: the stem halves the side once, not twice.
    """

    def __init__(
        self, plan: str | Plan = "small", classes: int = 1000, size: int = 224, ramp: Ramp = "published",
        drop_path: float = 0.0, layer_scale: float = 1e-6, small: bool = False,
    ):  # fmt: skip
        super().__init__()
        plan = PLANS[plan] if isinstance(plan, str) else plan
        last = max(1, sum(plan.depths) - 1)
        drops = (drop_path * i / last for i in range(last + 1))
        stages, inputs, side = [], 3, size
        for i, (dim, numbers) in enumerate(zip(plan.dims, blocks_of(plan, ramp), strict=True)):
            layers: list[nn.Module] = []
            if i == 0:
                stride = 1 if small else 2
                layers = [nn.Conv2d(3, dim // 2, 3, stride, 1), nn.BatchNorm2d(dim // 2), nn.GELU()]
                inputs, side = dim // 2, -(-side // stride)
            layers += [nn.Conv2d(inputs, dim, 3, 2, 1), nn.BatchNorm2d(dim)]
            inputs, side = dim, -(-side // 2)
            pool, scale = (2, None) if i < 2 else (1, layer_scale)
            blocks = [Block(*block, pool, next(drops), scale) for block in numbers]
            stages.append(Stage(nn.Sequential(*layers), dim, side, blocks))
        self.stages = nn.ModuleList(stages)
        self.norm, self.head = nn.LayerNorm(inputs, eps=1e-6), nn.Linear(inputs, classes)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, Stage):
                nn.init.trunc_normal_(m.place, std=0.02)

    def maps(self, x: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c h2 w2"]]:
        """Maps after each stage, of strides 4, 8, 16 and 32 (half of that with ``small``), not normalised."""
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """The average of the last map's normalised places."""
        return self.norm(self.maps(x)[-1].flatten(2).mT).mean(1)

    def from_features(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Logits of these features."""
        return self.head(features)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        return self.from_features(self.features(x))


_PARTS = {
    "mixer.conv.0": "attn.high_mixer.conv1", "mixer.conv.1": "attn.high_mixer.proj1",
    "mixer.pool.1": "attn.high_mixer.proj2", "mixer.qkv": "attn.low_mixer.qkv", "mixer.fuse": "attn.conv_fuse",
    "mixer.out": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "scale1": "layer_scale_1",
    "scale2": "layer_scale_2",
}  # fmt: skip


def published_keys(net: IFormer) -> dict[str, str]:
    """Our key -> the released weights' key of the same tensor."""
    keys = {}
    for ours in net.state_dict():
        key = re.sub(r"^stages\.0\.embed\.(\d)", lambda m: f"patch_embed.{('proj', 'norm')[int(m[1]) % 3]}"
                     f"{1 + int(m[1]) // 3}", ours)  # fmt: skip
        key = re.sub(r"^stages\.(\d)\.embed\.(\d)",
                     lambda m: f"patch_embed{int(m[1]) + 1}.{('proj', 'norm')[int(m[2])]}", key)  # fmt: skip
        key = re.sub(r"^stages\.(\d)\.place", lambda m: f"pos_embed{int(m[1]) + 1}", key)
        key = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"blocks{int(m[1]) + 1}", key)
        for part, theirs in _PARTS.items():
            key = re.sub(rf"^(blocks\d\.\d+\.){re.escape(part)}(?=\.|$)", rf"\1{theirs}", key)
        keys[ours] = key
    return keys


def load_published(net: IFormer, state: Mapping[str, Tensor]) -> None:
    """Put released weights into a net of their plan, with tables of places for 224 pixels.

    Raises:
        BadInput: a key or a shape is another.
    """
    keys, there = published_keys(net), net.state_dict()
    needed = {ours: theirs for ours, theirs in keys.items() if not theirs.endswith("num_batches_tracked")}
    if missing := sorted(set(needed.values()) - state.keys()):
        raise BadInput(f"the weight {missing[0]} is missing: give the released weights of this net")
    if beyond := sorted(state.keys() - set(keys.values())):
        raise BadInput(f"the net has no weight {beyond[0]}: give the released weights of this net")
    for ours, theirs in needed.items():
        if state[theirs].shape != there[ours].shape:
            told = f"{list(state[theirs].shape)}, not {list(there[ours].shape)}"
            hint = ", with tables for 224 pixels" if theirs.startswith("pos_embed") else ""
            raise BadInput(f"the weight {theirs} is of shape {told}: give the released weights of this net{hint}")
    net.load_state_dict({ours: state[theirs] for ours, theirs in needed.items()}, strict=False)
