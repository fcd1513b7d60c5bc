"""The first stage of compression with a diffusion decoder: a codec trained for rate and squared error alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.nets import Elic

from . import draw
from .recipe import Recipe


def rate_distortion(
    bpp: Float[Tensor, "batch"], x: Float[Tensor, "batch *dims"], x_hat: Float[Tensor, "batch *dims"], lam: float
) -> Float[Tensor, "batch"]:
    """R + lam 255^2 MSE of each picture, for pictures in [-1, 1]: the MSE is that of pictures in [0, 1].

    Args:
        bpp: R, bits for each pixel.
        lam: CompressAI's convention: 0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483 are its six lowest rates.
    """
    return bpp + lam * 255**2 * ((x_hat - x) / 2).square().flatten(1).mean(1)


def cropped(pictures: Pictures, rows: list[int], crop: int | None, rng: torch.Generator) -> Float[Tensor, "row 3 h w"]:
    """These pictures in [-1, 1], or of each a square of ``crop`` pixels from anywhere in it."""
    x = to_tensor([pictures.picture(row) for row in rows])
    if crop is None or crop == x.shape[-1]:
        return x
    room = x.shape[-1] - crop + 1
    top, left = (draw.integers(room, len(rows), rng).tolist() for _ in range(2))
    return torch.stack([one[:, r : r + crop, c : c + crop] for one, r, c in zip(x, top, left, strict=True)])


class CodecRecipe(Recipe):
    """`rate_distortion` with uniform noise on the latents for the rate and rounded ones for the picture.

    The medians of the factorised prior are drawn to where they belong by a loss of their own, which is added and
    reaches nothing else.
    """

    name = "codec"

    def __init__(self, codec: Elic, pictures: Pictures, crop: int | None, lam: float, flip: bool = False):
        self.codec, self.pictures, self.crop, self.lam, self.flip = codec, pictures, crop, lam, flip

    def modules(self) -> dict[str, nn.Module]:
        return {"codec": self.codec}

    def batch(self, step: int, rng: torch.Generator, size: int) -> Tensor:
        rows = draw.integers(len(self.pictures), size, rng).tolist()
        x = cropped(self.pictures, rows, self.crop, rng)
        if self.flip:
            x = torch.where((draw.uniform(size, rng) < 0.5).reshape(-1, 1, 1, 1), x.flip(-1), x)
        return x

    def loss(self, batch: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.to(self.codec.device)
        n, _, height, width = x.shape
        # Uniform numbers by way of normal ones, which are drawn the same however a batch is cut.
        noise = [
            (torch.special.ndtr(draw.normal(shape, rng).double()) - 0.5).float().to(x.device)
            for shape in self.codec.latent_shapes(n, height, width)
        ]
        x_hat, bits = self.codec(x, noise)
        bpp = bits / (height * width)
        loss = rate_distortion(bpp, x, x_hat.float(), self.lam).mean()
        mse = ((x_hat - x) / 2).square().mean()
        told = {"bpp": bpp.mean().detach(), "mse": mse.detach()}
        return loss + self.codec.prior.median_loss(), told
