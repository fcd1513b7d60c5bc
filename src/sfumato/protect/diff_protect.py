"""Diff-Protect: a small change of pixels that moves a picture's latent, by one engine with several gradient sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive, below
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.sampling import gated

from .base import Protection, See
from .parts.latents import padded
from .parts.pgd import pgd
from .parts.sources import NEEDS_TARGET, RANDOM_START, Residual, Source, direction, pattern
from .parts.tiles import Tile, blended, inside, tiles_of

UNIT = 2 / 255
"""A level of a file, where pictures lie in [-1, 1]."""
PROMPTS = {
    "anime": "an anime picture",
    "artwork": "an artwork painting",
    "landscape": "a landscape photo",
    "portrait": "a portrait photo",
}
"""What the paper tells the network of pictures of each kind; of all others "a photo"."""


@dataclass(frozen=True, kw_only=True)
class DiffProtect(Protection):
    """Projected sign-gradient steps against a latent diffusion model's encoder (arXiv:2311.12832).

    x <- clip(x + alpha sign(g(x))), at most ``budget`` from the clean picture, where g is, by ``source``,

        sds+, sds-      +- J_enc^T (eps_theta(z_t, t, c) - e)            score distillation
        sdst+, sdst-    +- r J_enc^T (eps_theta(z_t, t, c) - e) - grad L_T
        advdm+, advdm-  +- grad L_S
        encoder         - grad L_T                                       PhotoGuard's encoder attack
        mist, mist-     - grad(L_T - r L_S), - grad(- L_T - r L_S)

    with L_S = E mean ||eps_theta(z_t, t, c) - e||^2, t uniform, e normal, both drawn anew in every step, and
    L_T = ||z(x) - z(y)||^2 (a sum), y a picture of strong texture. z is the encoder's posterior sample, scaled as the
    network sees it. Score distillation is grad L_S without the network's Jacobian and the weights of t. "+" climbs the
    network's loss, "-" descends it; advdm, encoder and mist start at a random point of the box, sds at the picture.

    It protects against models that work on this encoder's latents or ones like it. It is fragile: JPEG, resizing and
    upscaling undo a part, which the report of `sfumato protect` measures; models of pixels are not affected.

    A picture larger than the model's is seen in tiles of the model's size that overlap: every step goes where the
    tiles' directions go in the mean, weighted towards each tile's middle, so that the change has no seams and one box
    holds it. Memory is then that of one tile.

    Cost, a step and tile: the encoder once there and back (sdst twice), and one pass of the network; with advdm and
    mist the network's backward pass too. What has a target encodes it anew in every step.

    Differs from the published code: what is written is rounded to whole levels inside the box, where it cuts them off
    and may exceed the budget by one; pictures keep their size, padded inside, where it squeezes them to 512 pixels; the
    target, unless one is given, is a zone plate, not the file that Mist comes with; ``draws`` and tiles are ours.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"updates": 3, "budget": 8, "step": 3.0, "batch": 2}
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"updates": 0}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{kind: {"prompt": prompt} for kind, prompt in PROMPTS.items()},
        "sketch": {"prompt": ""},
    }

    source: Source = "sds-"
    """Where the steps come from: sds- and sds+ (score distillation, down and up), sdst- and sdst+ (towards a target
    too), advdm+ and advdm- (the network's own gradient), encoder (towards the target's latent), mist, mist- (both)."""
    updates: Natural = 100
    """Steps."""
    step: Positive = 1.0
    """Size of a step, in levels of 255."""
    decay: bool = False
    """Let the step shrink to a hundredth, as in an encoder attack that the published code holds but does not use."""
    rate: NotNegative | None = None
    """Weight of the network's loss beside the target's; by default 5 (sdst) or 10,000 (mist)."""
    prompt: str = "a photo"
    """What the network is told that the pictures show, in general words."""
    draws: Count = 1
    """Times and noises in a step, averaged; each is another pass of the network."""
    posterior: Literal["sample", "mean"] = "sample"
    """What of the encoder's posterior is the latent."""
    target: Path | None = None
    """A picture of strong texture as the target; by default a zone plate."""
    tile: Natural | None = None
    """Side in pixels of the tiles in which larger pictures are seen; by default the model's size; 0: pictures of any
    size are seen whole."""
    overlap: Annotated[float, below(0, 1)] = 0.25
    """How much of a tile its neighbours share at least."""

    def steps(self, pictures: int) -> int:
        return self.updates * super().steps(pictures)

    def moved(
        self,
        p: Text2Image,
        x: Float[Tensor, "n colour height width"],
        see: See,
        generators: list[torch.Generator],
        advance: Callable[[], None],
    ) -> Tensor | None:
        check_encoder(p)
        if not self.updates:
            return None
        size = x.shape[-2:]
        encode = self.encoder(p, generators)
        residual = residuals(p, p.encode(self.prompt), generators)
        start = None
        if self.source in RANDOM_START:
            start = (2 * _uniform(x.shape[1:], generators).to(x) - 1) * (UNIT * self.budget)
        y = aimed_at(self.target, *size).to(x).expand(len(x), -1, -1, -1) if self.source in NEEDS_TARGET else None
        unit = p.codec.factor * p.codec.multiple
        side = -(-(p.size if self.tile is None else self.tile or max(size)) // unit) * unit
        shared = int(side * self.overlap)
        tiles = tiles_of(size[0], size[1], side, shared, unit)

        def towards(now: Tensor, tile: Tile) -> Tensor:
            rows, columns = tile
            view = lambda here: encode(see(inside(here, tile, size))[..., rows, columns])
            target = None if y is None else lambda: encode(y[..., rows, columns])
            return direction(self.source, now[..., rows, columns], view, residual, target, self.rate, self.draws)

        return pgd(
            x, lambda now: blended(now.shape, tiles, lambda tile: towards(now, tile), shared),
            eps=UNIT * self.budget, alpha=UNIT * self.step, updates=self.updates, start=start, decay=self.decay,
            advance=advance,
        )  # fmt: skip

    def encoder(self, p: Text2Image, generators: list[torch.Generator]) -> Callable[[Tensor], Tensor]:
        """Pictures in [-1, 1] of any size to latents, every picture's draw from its own generator."""

        def encode(x: Tensor) -> Tensor:
            mean, std = p.posterior(padded(x, p.codec.factor * p.codec.multiple))
            return mean if self.posterior == "mean" else mean + std * _normal(mean.shape[1:], generators).to(std)

        return encode


def residuals(p: Text2Image, cond: Conditioning, generators: list[torch.Generator]) -> Residual:
    """z -> eps_theta(alpha_t z + sigma_t e, t, c) - e, every picture's t and e from its own generator; differentiable.

    t is uniform over the model's timesteps; a network that predicts something else is converted to eps.
    """
    steps = p.clock.timesteps

    def residual(z: Tensor) -> Tensor:
        t = torch.stack([(torch.randint(steps, (), generator=g) + 1) / steps for g in generators])
        eps = _normal(z.shape[1:], generators).to(z)
        alpha, sigma = p.process.alpha_sigma(t, z)
        noised = alpha * z + sigma * eps
        with gated(p, cond):
            pred = p.denoiser(noised, t, cond)
        return p.process.convert(pred, noised, t, p.denoiser.prediction, "eps") - eps

    return residual


def aimed_at(file: Path | None, height: int, width: int) -> Float[Tensor, "1 3 height width"]:
    """The target in [-1, 1]: a picture's central square, stretched to the size, or a zone plate.

    Raises:
        BadInput: the file cannot be read.
    """
    if file is None:
        return pattern(height, width)
    from sfumato.data.base import to_square, to_tensor

    side = max(height, width)
    x = to_tensor([to_square(file, side)])
    return F.interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)


def check_encoder(p: Text2Image) -> None:
    """Raise `BadInput` for an encoder in float16, whose gradients underflow to zero."""
    if p.autoencoder.dtype == torch.float16:
        raise BadInput("gradients of an encoder in float16 underflow: load the model in float32 or bfloat16")


def _normal(shape: torch.Size | tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def _uniform(shape: torch.Size | tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.rand(tuple(shape), generator=g) for g in generators])
