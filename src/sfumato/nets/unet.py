"""The U-Net of denoising diffusion models: diffusers' ``UNet2DModel`` under the signature of `sfumato.nets`."""

from __future__ import annotations

from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

from .blocks import groups


class UNet(ModelMixin, ConfigMixin):
    """Residual blocks with self-attention at low resolution (arXiv:2006.11239, appendix B).

    Args:
        size: side of the pictures in pixels, divisible by 2^(levels - 1).
        in_channels: channels of the pictures, in and out.
        classes: number of classes, 0 for none; class number ``classes`` then means "none".
        channels: channels of the levels, each at half the side of the one before.
        layers: residual blocks a level.
        attention: sides at which there is self-attention.
        dropout: in all residual blocks.
    """

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        in_channels: int = 3,
        classes: int = 0,
        channels: tuple[int, ...] = (64, 128, 128),
        layers: int = 2,
        attention: tuple[int, ...] = (16, 8),
        dropout: float = 0.0,
    ):
        super().__init__()
        sides = [size // 2**i for i in range(len(channels))]
        attends = [side in tuple(attention) for side in sides]
        self.unet = UNet2DModel(
            sample_size=size,
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            dropout=dropout,
            norm_num_groups=groups(*channels),
            attention_head_dim=min(32, min(channels)),
            num_class_embeds=classes + 1 if classes else None,
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(
        self,
        z: Float[Tensor, "batch channel height width"],
        logsnr: Float[Tensor, "batch"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channel height width"]:
        """See `sfumato.nets`."""
        # Log-SNRs of -20 to 20 fill the range of 0 to 1000 that the sinusoidal embedding was made for.
        return self.unet(z, 25.0 * (20.0 - logsnr), labels, return_dict=False)[0]
