"""The network of latent consistency training: a U-Net inside the parametrisation that is the identity without noise.

Non-scaling layer normalisation is that of sLCT (arXiv:2502.01441), the parametrisation that of consistency models
(arXiv:2303.01469).
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

from .simple_uvit import SimpleUNet

Axes = Literal["sample", "channel"]


def preconditioning(
    sigma: Float[Tensor, "..."], sigma_data: float = 0.5, sigma_min: float = 0.002
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(c_skip, c_out, c_in) of f(x, t) = c_skip x + c_out F(c_in x) at the noise level t; c_out(t_min) = 0.

    c_skip = s^2 / ((t - t_min)^2 + s^2), c_out = s (t - t_min) / sqrt(t^2 + s^2), c_in = 1 / sqrt(t^2 + s^2).
    """
    away, norm = sigma - sigma_min, (sigma**2 + sigma_data**2).sqrt()
    return sigma_data**2 / (away**2 + sigma_data**2), sigma_data * away / norm, 1 / norm


def non_scaling_norm(
    h: Float[Tensor, "batch channel *dims"], bias: Float[Tensor, "channel *dims"], axes: Axes = "sample",
    eps: float = 1e-5,
) -> Float[Tensor, "batch channel *dims"]:
    """(h - mean) / sqrt(var + eps) + bias, over a whole sample or over its channels at each place; var is biased."""
    dims = tuple(range(1, h.ndim)) if axes == "sample" else 1
    var, mean = torch.var_mean(h, dims, correction=0, keepdim=True)
    return (h - mean) * torch.rsqrt(var + eps) + bias.to(h.dtype)


class NonScalingLayerNorm(nn.Module):
    """Layer normalisation without a trainable scale, so that channels with outliers cannot be amplified.

    The published module keeps a frozen scale of ones among its weights; here there is none.
    """

    def __init__(self, shape: tuple[int, ...], axes: Axes = "sample", eps: float = 1e-5):
        super().__init__()
        self.axes, self.eps, self.bias = axes, eps, nn.Parameter(torch.zeros(shape))

    def forward(self, h: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        return non_scaling_norm(h, self.bias, self.axes, self.eps)


class ConsistencyUNet(ModelMixin, ConfigMixin):
    """A U-Net F with f(x, t) = c_skip(t) x + c_out(t) F(c_in(t) x, 250 ln t) around it, under noise with alpha = 1.

    It predicts x0, at ``sigma_min`` exactly x. Fresh, F returns zeros.

    Args:
        size: side of the latents.
        in_channels: their channels.
        classes: number of classes, 0 for none; class number ``classes`` then means "none".
        channels, blocks: of each level, the finest first; the side is halved between levels.
        attention: sides of feature maps with self-attention.
        head_dim, embedding, dropout: as `SimpleUNet`.
        norm: "nonscaling" in place of all group normalisations, or "group".
        axes: what "nonscaling" normalises over: the "sample", with a bias for each of its elements, or the "channel"s.
        sigma_data: standard deviation of the data.
        sigma_min: the noise level at which it is the identity.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        in_channels: int = 4,
        classes: int = 0,
        channels: tuple[int, ...] = (128, 256, 384, 512),
        blocks: tuple[int, ...] = (4, 4, 4, 4),
        attention: tuple[int, ...] = (16, 8),
        head_dim: int = 64,
        embedding: int = 512,
        dropout: float = 0.0,
        norm: Literal["nonscaling", "group"] = "nonscaling",
        axes: Axes = "sample",
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
    ):
        super().__init__()
        self.unet = SimpleUNet(
            size, in_channels, classes, tuple(channels), tuple(blocks), tuple(attention), head_dim, embedding, dropout,
            dropout_from=size, front="conv",
        )  # fmt: skip
        if norm == "nonscaling":
            levels = self.unet.levels
            for i in range(len(channels)):
                _replace_norms(levels.down[i], size >> i, axes)
                _replace_norms(levels.up[i], size >> i, axes)
            _replace_norms(self.unet.exit, size, axes)

    def forward(
        self,
        z: Float[Tensor, "batch channel height width"],
        logsnr: Float[Tensor, "batch"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channel height width"]:
        """See `sfumato.nets`; the log-SNR is -2 ln t."""
        sigma = torch.exp(-logsnr / 2).view(-1, *[1] * (z.ndim - 1))
        c_skip, c_out, c_in = preconditioning(sigma, self.config.sigma_data, self.config.sigma_min)
        # The network's sinusoids see 25 (20 - l): with this l that is 250 ln t.
        inside = self.unet(c_in * z, 20.0 + 5.0 * logsnr, labels)
        return c_skip * z + c_out * inside


def _replace_norms(module: nn.Module, side: int, axes: Axes) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            shape = (child.num_channels, side, side) if axes == "sample" else (child.num_channels, 1, 1)
            setattr(module, name, NonScalingLayerNorm(shape, axes))
        else:
            _replace_norms(child, side, axes)
