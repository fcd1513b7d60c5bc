"""`Codec`: from pictures to what a pipeline's network denoises, and back, both differentiable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from sfumato.errors import BadInput

from . import offload


def overflows(vae: Any) -> bool:
    """Whether an autoencoder says that it cannot compute in float16."""
    return bool(vae.config.get("force_upcast"))


def widen(vae: nn.Module) -> None:
    """Let an autoencoder compute in float32, whatever it is given: diffusers' own call gives it what its network has.

    The hooks are plain functions without a state, so that copies have them too.
    """
    vae.to(torch.float32)
    there = dict(vae.named_modules())
    for entry in (there[name] for name in ("encoder.conv_in", "post_quant_conv", "decoder.conv_in") if name in there):
        entry.register_forward_pre_hook(_as_weights)


def _as_weights(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args[0].to(layer.weight.dtype), *args[1:]


@dataclass(frozen=True)
class Codec:
    """An autoencoder (``AutoencoderKL`` or ``AutoencoderDC``) with the scale in which the network sees its latents.

    That is (z - shift_factor) scaling_factor, or (z - latents_mean) / latents_std scaling_factor where the
    configuration has statistics by channel; without any of them z itself. Latents are never packed here: packing is a
    matter of how a network is called.

    Attributes:
        vae: the autoencoder; its configuration is read at every call.
        multiple: a latent's side must be a multiple of it, for networks that take patches or packed latents.
    """

    vae: Any
    multiple: int = 1

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        config = self.vae.config
        return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        return self.vae.config.latent_channels

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a square picture with that side in pixels.

        Raises:
            BadInput: the side is not a multiple of what the autoencoder and the network need.
        """
        unit = self.factor * self.multiple
        if size <= 0 or size % unit:
            raise BadInput(f"size {size} is not a multiple of {unit} pixels, as this model needs")
        side = size // self.factor
        return self.channels, side, side

    def encode(
        self, x: Float[Tensor, "batch 3 height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch channel h w"]:
        """Scaled latents of pictures in [-1, 1]: the posterior's mean, or a ``generator``'s draw.

        A deterministic autoencoder (DC-AE) has no posterior, and takes no notice of the generator.
        """
        encoded = self._asked("encode", x)
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            z = posterior.mode() if generator is None else posterior.sample(generator=generator)
        else:
            z = encoded.latent
        return self.scale(z).to(x.dtype)

    def posterior(
        self, x: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch channel h w"], Float[Tensor, "batch channel h w"]]:
        """Mean and standard deviation of the scaled latents of pictures in [-1, 1], to draw from again and again.

        The deviation of a deterministic autoencoder (DC-AE) is 0.
        """
        encoded = self._asked("encode", x)
        if not hasattr(encoded, "latent_dist"):
            z = self.scale(encoded.latent).to(x.dtype)
            return z, torch.zeros_like(z)
        mean, std = encoded.latent_dist.mode(), encoded.latent_dist.std
        return self.scale(mean).to(x.dtype), (self.scale(std) - self.scale(torch.zeros_like(std))).to(x.dtype)

    def decode(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Pictures in about [-1, 1] (not clipped) of scaled latents, in the type of ``z``."""
        return self._asked("decode", self.unscale(z), return_dict=False)[0].to(z.dtype)

    def scale(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        """The autoencoder's own latents as the network sees them."""
        mean, std = self._statistics(z)
        return (z - mean) / std * self.vae.config.get("scaling_factor", 1.0)

    def unscale(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        """The inverse of `scale`."""
        mean, std = self._statistics(z)
        return z / self.vae.config.get("scaling_factor", 1.0) * std + mean

    def _asked(self, what: str, x: Tensor, **options: Any) -> Any:
        """What the autoencoder encodes or decodes, in float32 where it is in float16 and overflows.

        As diffusers' own call does it, but with weights converted for this call alone: they are the caller's, and a
        gradient may still need them as they were.

        Raises:
            BadInput: that, and its weights are offloaded layer by layer.
        """
        if self.vae.dtype != torch.float16 or not overflows(self.vae):
            return getattr(self.vae, what)(x.to(self.vae.dtype), **options)
        offload.wake(self.vae)
        weights = [*self.vae.named_parameters(), *self.vae.named_buffers()]
        if any(w.is_meta for _, w in weights):
            raise BadInput(
                "the autoencoder of this pipeline overflows in float16, and its weights are offloaded layer by layer: "
                "make it float32 before they are, pipe.vae.to(torch.float32)"
            )
        wide = {f"vae.{name}": w.float() if w.is_floating_point() else w for name, w in weights}
        return functional_call(_Asked(self.vae, what), wide, (x.float(),), options)

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return config.get("shift_factor") or 0.0, 1.0
        return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)


class _Asked(nn.Module):
    """An autoencoder as a function of pictures or latents, to be called with other weights."""

    def __init__(self, vae: Any, what: str):
        super().__init__()
        self.vae, self.what = vae, what

    def forward(self, x: Tensor, **options: Any) -> Any:
        return getattr(self.vae, self.what)(x, **options)


class PatchCodec(Codec):
    """An autoencoder whose latents the network sees in patches of 2x2, normalised by channel (``AutoencoderKLFlux2``).

    A latent is here what the network sees: four times the channels, at half the side. Mean and variance are those that
    the autoencoder's batch norm has kept.
    """

    @property
    def factor(self) -> int:
        return 2 * super().factor

    @property
    def channels(self) -> int:
        return 4 * super().channels

    def scale(self, z: Float[Tensor, "batch channel h2 w2"]) -> Float[Tensor, "batch channel4 h w"]:
        mean, std = self._statistics(z)
        return (pixel_unshuffle(z, 2) - mean) / std

    def unscale(self, z: Float[Tensor, "batch channel4 h w"]) -> Float[Tensor, "batch channel h2 w2"]:
        mean, std = self._statistics(z)
        return pixel_shuffle(z * std + mean, 2)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm, eps = self.vae.bn, self.vae.config.batch_norm_eps
        mean, variance = (x.view(1, -1, 1, 1) for x in (norm.running_mean, norm.running_var))
        return mean.to(like), (variance + eps).sqrt().to(like)


class FrameCodec(Codec):
    """An autoencoder of videos (``AutoencoderKLQwenImage``), to which a picture is one frame."""

    @property
    def factor(self) -> int:
        return 2 ** len(self.vae.config.temperal_downsample)

    @property
    def channels(self) -> int:
        return self.vae.config.z_dim

    def encode(
        self, x: Float[Tensor, "batch 3 height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch channel h w"]:
        posterior = self.vae.encode(x[:, :, None].to(self.vae.dtype)).latent_dist
        z = posterior.mode() if generator is None else posterior.sample(generator=generator)
        return self.scale(z[:, :, 0]).to(x.dtype)

    def posterior(
        self, x: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch channel h w"], Float[Tensor, "batch channel h w"]]:
        drawn = self.vae.encode(x[:, :, None].to(self.vae.dtype)).latent_dist
        mean, std = drawn.mode()[:, :, 0], drawn.std[:, :, 0]
        return self.scale(mean).to(x.dtype), (self.scale(std) - self.scale(torch.zeros_like(std))).to(x.dtype)

    def decode(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch 3 height width"]:
        frames = self.unscale(z)[:, :, None].to(self.vae.dtype)
        return self.vae.decode(frames, return_dict=False)[0][:, :, 0].to(z.dtype)
