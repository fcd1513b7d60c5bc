"""The U-Net of CPDM: diffusers' ``UNet2DConditionModel``, told a class by its text and by a picture of it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .blocks import groups
from .simple_uvit import check_side

Heard = tuple[Float[Tensor, "batch token width"], Float[Tensor, "batch channel height width"]]
"""The text vectors of each picture's class, and the class's prototype."""


class PrototypeUNet(ModelMixin, ConfigMixin):
    """Residual blocks with cross-attention to text; a prototype lies beside the noisy picture, as more channels.

    It keeps what it knows of the classes: ``words``, their frozen text vectors, and ``prototypes``, a picture of each.

    Args:
        size: side of the pictures in pixels, divisible by 2^(levels - 1).
        in_channels: channels of the pictures, in and out.
        classes: number of classes.
        tokens, text_width: text vectors of a class, and how long each is.
        prototyped: whether it looks at prototypes; without, it has no channels for them.
        channels: channels of the levels, each at half the side of the one before.
        layers: residual blocks a level.
        crossing: sides at which there is cross-attention, besides the middle.
        heads: heads of the attention.
    """

    @register_to_config
    def __init__(
        self,
        size: int = 64,
        in_channels: int = 3,
        classes: int = 10,
        tokens: int = 1,
        text_width: int = 768,
        prototyped: bool = True,
        channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        layers: int = 2,
        crossing: tuple[int, ...] = (4,),
        heads: int = 8,
    ):
        super().__init__()
        check_side(size, 1 << (len(channels) - 1))
        sides = [size // 2**i for i in range(len(channels))]
        if odd := [side for side in crossing if side not in sides]:
            raise BadInput(f"crossing: no level has a side of {odd[0]}: choose from {', '.join(map(str, sides))}")
        crosses = [side in tuple(crossing) for side in sides]
        self.unet = UNet2DConditionModel(
            sample_size=size,
            in_channels=in_channels * (2 if prototyped else 1),
            out_channels=in_channels,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            down_block_types=tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crosses),
            up_block_types=tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crosses)),
            cross_attention_dim=text_width,
            encoder_hid_dim=text_width,
            encoder_hid_dim_type="text_proj",
            attention_head_dim=heads,  # which diffusers reads as their number
            norm_num_groups=groups(*channels),
        )
        self.register_buffer("words", torch.zeros(classes, tokens, text_width))
        self.prototypes = nn.Parameter(torch.zeros(classes, in_channels, size, size))

    def layers(self, *kinds: str) -> dict[str, nn.Linear]:
        """Linear maps by name: "text_proj" (in front of all cross-attention), or its "q", "k", "v" and "out"."""
        ends = {"text_proj": "encoder_hid_proj", "q": "attn2.to_q", "k": "attn2.to_k", "v": "attn2.to_v",
                "out": "attn2.to_out.0"}  # fmt: skip
        wanted = tuple(ends[kind] for kind in kinds)
        named: Any = self.unet.named_modules()
        return {name: module for name, module in named if wanted and name.endswith(wanted)}

    def forward(
        self,
        z: Float[Tensor, "batch channel height width"],
        logsnr: Float[Tensor, "batch"],
        heard: Heard,
    ) -> Float[Tensor, "batch channel height width"]:
        """See `sfumato.nets`; in place of class numbers it is told ``heard``."""
        words, prototypes = heard
        x = torch.cat([prototypes, z], dim=1) if self.config["prototyped"] else z
        # Log-SNRs of -20 to 20 fill the range of 0 to 1000 that the sinusoidal embedding was made for.
        return self.unet(x, 25.0 * (20.0 - logsnr), words, return_dict=False)[0]
