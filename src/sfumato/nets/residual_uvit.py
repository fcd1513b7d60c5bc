"""The Residual U-ViT of SiD2: no skips from inside a level, one residual around each change of resolution."""

from __future__ import annotations

from typing import Literal

from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from sfumato.errors import BadInput

from .blocks import Convolutions, Down, Embedding, Positions, Transformer, Up, group_norm, zeroed
from .simple_uvit import check_side

Kind = Literal["res", "transformer"]


class ResidualUViT(ModelMixin, ConfigMixin):
    """SiD2's network (arXiv:2410.19324): levels of residual blocks, then of transformer blocks.

    On the way down ``x = blocks(x); before = x; x = down(x); after = x``, on the way up
    ``x = blocks(up(x - after) + before)``. All blocks are the identity when new and ``up`` has no bias, so a new
    network's body returns its input exactly. A level's activations are free once it is done.

    UViT/p of the paper is ``patch`` p. Half the patch is four times the tokens and the work, with the same
    parameters: its "flop-heavy" scaling.

    Args:
        size: side of the pictures in pixels.
        in_channels: channels of the pictures, in and out.
        classes: number of classes, 0 for none; class number ``classes`` then means "none".
        patch: side of the squares of pixels that become one vector; 1, 2 or 4.
        channels: of the levels, the last one is the middle.
        kinds: of their blocks, "res" or "transformer".
        blocks: on the way down and again on the way up, of each level but the middle.
        middle: blocks of the middle.
        head_dim: channels of an attention head.
        embedding: width of the embedding of log-SNR and class.
        dropout: in the transformer blocks; residual blocks have none.
        conditioned: modulate every block by log-SNR and class. Otherwise they enter once, behind the patches: the
            paper's listing shows no time in the blocks, and some public ports have none.
        positions: "rotary" (any size of picture, no parameters), or "learned" at the entry of each transformer level.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        in_channels: int = 3,
        classes: int = 0,
        patch: int = 1,
        channels: tuple[int, ...] = (64, 128, 256),
        kinds: tuple[Kind, ...] = ("res", "transformer", "transformer"),
        blocks: tuple[int, ...] = (2, 2),
        middle: int = 4,
        head_dim: int = 64,
        embedding: int = 256,
        dropout: float = 0.0,
        conditioned: bool = True,
        positions: Positions = "rotary",
    ):
        super().__init__()
        if not len(channels) == len(kinds) == len(blocks) + 1:
            raise BadInput(
                f"channels ({len(channels)}) and kinds ({len(kinds)}) need one entry a level, "
                f"and blocks ({len(blocks)}) one less, since the middle has its own"
            )
        check_side(size, patch << len(blocks))
        self.gradient_checkpointing = False
        inside = embedding if conditioned else None
        self.embed = Embedding(embedding, classes)
        self.once = None if conditioned else nn.Linear(embedding, channels[0])
        self.entry = nn.Conv2d(in_channels, channels[0], patch, stride=patch)
        self.norm = group_norm(channels[0])
        self.exit = zeroed(nn.Conv2d(channels[0], in_channels * patch**2, 1))

        def stack(i: int, depth: int) -> nn.Module:
            if kinds[i] == "res":
                return Convolutions(channels[i], depth, inside)
            side = (size // patch) >> i
            return Transformer(channels[i], depth, side, inside, head_dim, dropout, positions)

        levels = range(len(blocks))
        self.way_down = nn.ModuleList(stack(i, blocks[i]) for i in levels)
        self.smaller = nn.ModuleList(Down(channels[i], channels[i + 1]) for i in levels)
        self.bottom = stack(len(blocks), middle)
        self.larger = nn.ModuleList(Up(channels[i + 1], channels[i]) for i in levels)
        self.way_up = nn.ModuleList(stack(i, blocks[i]) for i in levels)

    def body(self, x: Float[Tensor, "batch channels height width"], emb: Tensor) -> Tensor:
        """All levels, from the patches' feature map to one of the same shape."""
        save_memory, kept = self.gradient_checkpointing, []
        for blocks, smaller in zip(self.way_down, self.smaller, strict=True):
            before = blocks(x, emb, save_memory)
            x = smaller(before)
            kept.append((before, x))
        x = self.bottom(x, emb, save_memory)
        for blocks, larger in zip(reversed(self.way_up), reversed(self.larger), strict=True):
            before, after = kept.pop()
            x = blocks(larger(x - after) + before, emb, save_memory)
        return x

    def forward(
        self,
        z: Float[Tensor, "batch channel height width"],
        logsnr: Float[Tensor, "batch"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channel height width"]:
        """See `sfumato.nets`."""
        emb, x = self.embed(logsnr, labels), self.entry(z)
        if self.once is not None:
            x = x + self.once(emb)[:, :, None, None]
        return pixel_shuffle(self.exit(self.norm(self.body(x, emb))), self.config.patch)
