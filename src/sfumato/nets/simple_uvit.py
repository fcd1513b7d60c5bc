"""The two networks of simple diffusion (arXiv:2301.11093): a U-Net whose 16x16 level is scaled, and the U-ViT.

`SimpleUViT` is neither the all-token U-ViT of arXiv:2209.12152 nor diffusers' ``UVit2DModel``.
"""

from __future__ import annotations

from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float, Int
from torch import Tensor, cat, nn

from sfumato.errors import BadInput

from .blocks import Down, Embedding, MapAttention, ResBlock, Transformer, Up, run
from .wavelet import Entry, Exit, Front


class Levels(nn.Module):
    """Convolutional levels, each at half the side: every block on the way down is a concatenated skip on the way up.

    Blocks have dropout where the feature map's side is at most ``dropout_from``, attention where it is in
    ``attention``.
    """

    def __init__(
        self,
        side: int,
        channels: tuple[int, ...],
        blocks: tuple[int, ...],
        embedding: int,
        dropout: float,
        dropout_from: int,
        attention: tuple[int, ...] = (),
        head_dim: int = 64,
    ):
        super().__init__()
        if len(channels) != len(blocks):
            raise BadInput(f"{len(channels)} levels have channels and {len(blocks)} have blocks: give as many of both")
        self.gradient_checkpointing = False
        self.down, self.up, self.smaller, self.larger = (nn.ModuleList() for _ in range(4))
        for i, (c, n) in enumerate(zip(channels, blocks, strict=True)):
            here = side >> i
            drop, attends = (dropout if here <= dropout_from else None), here in attention
            for way, skip in ((self.down, 0), (self.up, c)):
                way.append(nn.ModuleList(_Block(c, embedding, drop, skip, attends, head_dim) for _ in range(n)))
            if i:
                self.smaller.append(Down(channels[i - 1], c))
                self.larger.append(Up(c, channels[i - 1]))

    def descend(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The lowest feature map, and what the way up will need."""
        skips = []
        for i, level in enumerate(self.down):
            x = self.smaller[i - 1](x) if i else x
            for block in level:
                x = run([block], x, emb, self.gradient_checkpointing)
                skips.append(x)
        return x, skips

    def ascend(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """The way up; empties ``skips``."""
        for i in reversed(range(len(self.up))):
            for block in self.up[i]:
                x = run([block], cat([x, skips.pop()], dim=1), emb, self.gradient_checkpointing)
            x = self.larger[i - 1](x) if i else x
        return x


class _Block(nn.Module):
    """A `ResBlock`, with attention behind it where the level has any."""

    def __init__(
        self, channels: int, embedding: int, dropout: float | None, skip: int, attends: bool, head_dim: int
    ):  # fmt: skip
        super().__init__()
        self.convolutions = ResBlock(channels, embedding, dropout, skip)
        self.attention = MapAttention(channels, head_dim) if attends else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.convolutions(x, emb))


class SimpleUViT(ModelMixin, ConfigMixin):
    """Convolutional levels around a plain transformer: section 3.2 of the paper, "U-ViT".

    Only the convolutional levels have skips; the transformer, at side ``size / factor / 2^levels`` (16 in the paper),
    has none but its own residuals. Fresh, it returns zeros.

    Args:
        size: side of the pictures in pixels.
        in_channels: channels of the pictures, in and out.
        classes: number of classes, 0 for none; class number ``classes`` then means "none".
        channels, blocks: of each convolutional level, the finest first.
        depth, width, head_dim: blocks, channels and channels a head of the transformer; depth 0 is allowed.
        embedding: width of the embedding of log-SNR and class.
        dropout: where the side of the feature map is at most ``dropout_from``.
        factor: 1, 2 or 4: how many times smaller the first feature map is.
        front: how it gets smaller: "5/3" or "haar" wavelets, or "conv" patches.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        in_channels: int = 3,
        classes: int = 0,
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
        self.embed = Embedding(embedding, classes)
        self.entry = Entry(in_channels, channels[0], factor, front)
        side, bottom = size // factor, (size // factor) >> len(channels)
        self.levels = Levels(side, tuple(channels), tuple(blocks), embedding, dropout, dropout_from)
        self.smaller, self.larger = Down(channels[-1], width), Up(width, channels[-1])
        drop = dropout if bottom <= dropout_from else None
        self.transformer = Transformer(width, depth, bottom, embedding, head_dim, drop)
        self.exit = Exit(channels[0], in_channels, factor, front)

    def forward(
        self,
        z: Float[Tensor, "batch channel height width"],
        logsnr: Float[Tensor, "batch"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channel height width"]:
        """See `sfumato.nets`."""
        emb = self.embed(logsnr, labels)
        x, skips = self.levels.descend(self.entry(z), emb)
        x = self.larger(self.transformer(self.smaller(x), emb, self.gradient_checkpointing))
        return self.exit(self.levels.ascend(x, skips, emb))


class SimpleUNet(ModelMixin, ConfigMixin):
    """The U-Net of the paper's section 3.2: as many blocks a level as ``blocks`` says, most of them at 16x16.

    Args:
        size, in_channels, classes, embedding, dropout, dropout_from, factor, front: as `SimpleUViT`.
        channels, blocks: of each level, the finest first; ``size / factor`` is halved between levels.
        attention: sides of feature maps with self-attention.
        head_dim: channels of an attention head.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        in_channels: int = 3,
        classes: int = 0,
        channels: tuple[int, ...] = (64, 128, 128),
        blocks: tuple[int, ...] = (2, 3, 2),
        attention: tuple[int, ...] = (16, 8),
        head_dim: int = 64,
        embedding: int = 256,
        dropout: float = 0.0,
        dropout_from: int = 16,
        factor: int = 1,
        front: Front = "5/3",
    ):
        super().__init__()
        check_side(size, factor << (len(channels) - 1))
        self.embed = Embedding(embedding, classes)
        self.entry = Entry(in_channels, channels[0], factor, front)
        self.levels = Levels(
            size // factor, tuple(channels), tuple(blocks), embedding, dropout, dropout_from, tuple(attention), head_dim
        )
        self.exit = Exit(channels[0], in_channels, factor, front)

    def forward(
        self,
        z: Float[Tensor, "batch channel height width"],
        logsnr: Float[Tensor, "batch"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channel height width"]:
        """See `sfumato.nets`."""
        emb = self.embed(logsnr, labels)
        x, skips = self.levels.descend(self.entry(z), emb)
        return self.exit(self.levels.ascend(x, skips, emb))


def check_side(size: int, least: int) -> None:
    """Refuse pictures that cannot be halved as often as a network wants to.

    Raises:
        BadInput: ``size`` is no multiple of ``least``.
    """
    if size % least:
        raise BadInput(f"this network halves pictures down to 1/{least} of their side, which {size} does not allow")
