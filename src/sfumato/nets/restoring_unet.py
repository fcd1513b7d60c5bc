"""A U-Net of convolutions alone that is shown a degraded picture beside the noisy one: HFD's network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .blocks import Down, Embedding, Up, run, zeroed


class PlaceNorm(nn.Module):
    """Normalisation over the channels at each place, so that no place hears of far ones."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        rows = F.layer_norm(x.movedim(1, -1), x.shape[1:2], self.weight.to(x.dtype), self.bias.to(x.dtype), eps=1e-5)
        return rows.movedim(-1, 1)


class LocalBlock(nn.Module):
    """Two 3x3 convolutions, modulated (FiLM) by the embedding; ``skip`` more channels may come in on the way up."""

    def __init__(self, channels: int, embedding: int, skip: int = 0):
        super().__init__()
        inside = channels + skip
        self.norm1, self.conv1 = PlaceNorm(inside), nn.Conv2d(inside, channels, 3, padding=1)
        self.norm2, self.conv2 = PlaceNorm(channels), zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.film = zeroed(nn.Linear(embedding, 2 * channels))
        self.shortcut = nn.Conv2d(inside, channels, 1) if skip else nn.Identity()

    def forward(self, x: Float[Tensor, "batch inside h w"], emb: Tensor) -> Float[Tensor, "batch channel h w"]:
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class RestoringUNet(ModelMixin, ConfigMixin):
    """Predicts from the noisy picture and the degraded one, stacked along the channels; any size, no attention.

    All it does is local: what it says of a place depends on nothing farther away than `reach`. Fresh, it returns zeros.

    Args:
        in_channels: channels of a picture.
        channels, blocks: of each level, the finest first; the side is halved between levels.
        embedding: width of the embedding of the log-SNR.

    Raises:
        BadInput: levels without channels or blocks.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        channels: tuple[int, ...] = (64, 128, 256),
        blocks: tuple[int, ...] = (2, 2, 4),
        embedding: int = 256,
    ):
        super().__init__()
        if len(channels) != len(blocks) or not channels:
            raise BadInput(f"{len(channels)} levels have channels and {len(blocks)} have blocks: give as many of both")
        self.gradient_checkpointing = False
        self.embed = Embedding(embedding)
        self.entry = nn.Conv2d(2 * in_channels, channels[0], 3, padding=1)
        self.down, self.up, self.smaller, self.larger = (nn.ModuleList() for _ in range(4))
        for i, (c, n) in enumerate(zip(channels, blocks, strict=True)):
            for way, skip in ((self.down, 0), (self.up, c)):
                way.append(nn.ModuleList(LocalBlock(c, embedding, skip) for _ in range(n)))
            if i:
                self.smaller.append(Down(channels[i - 1], c))
                self.larger.append(Up(c, channels[i - 1]))
        self.exit = nn.Sequential(
            PlaceNorm(channels[0]), nn.SiLU(), zeroed(nn.Conv2d(channels[0], in_channels, 3, padding=1))
        )

    @property
    def factor(self) -> int:
        """What the sides of its pictures have to be multiples of."""
        return 2 ** (len(self.config["channels"]) - 1)

    @property
    def reach(self) -> int:
        """Pixels: no place hears of one that is farther away, along the rows or columns."""
        inside = sum(2 * 2 * n * 2**i for i, n in enumerate(self.config["blocks"]))
        return 2 + inside + 2 * (self.factor - 1)

    def forward(
        self,
        z: Float[Tensor, "batch channel height width"],
        logsnr: Float[Tensor, "batch"],
        degraded: Float[Tensor, "batch channel height width"],
    ) -> Float[Tensor, "batch channel height width"]:
        """See `sfumato.nets`; in place of class numbers it is told the degraded picture."""
        emb, skips = self.embed(logsnr, None), []
        x = self.entry(torch.cat([z, degraded], 1))
        for i, level in enumerate(self.down):
            x = self.smaller[i - 1](x) if i else x
            for block in level:
                x = run([block], x, emb, self.gradient_checkpointing)
                skips.append(x)
        for i in reversed(range(len(self.up))):
            for block in self.up[i]:
                x = run([block], torch.cat([x, skips.pop()], 1), emb, self.gradient_checkpointing)
            x = self.larger[i - 1](x) if i else x
        return self.exit(x)
