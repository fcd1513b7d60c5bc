"""sLCT: latent consistency models trained from scratch, robust against the outliers of latents (arXiv:2502.01441)."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, Share, at_least
from sfumato.nets import ConsistencyUNet
from sfumato.noise import GaussianProcess, Karras
from sfumato.pipeline import ImageModel, Labels, LatentModel, open_autoencoder, standardised
from sfumato.pipeline.codec import Codec
from sfumato.pipeline.saving import weights_sha256

from . import draw
from .autoencoder import encode_all
from .consistency import (
    couple,
    diffusion_loss,
    draw_indices,
    early,
    index_law,
    levels_at,
    loss_scale,
    noise_levels,
    robust,
)
from .loop import Run
from .pixels import PixelRecipe, PixelTraining
from .recipe import Turn
from .schedule import learning_rate, resolved_precision
from .state import configuration, goes_on

_ICT = {
    "loss_kind": "pseudo-huber", "diffusion_weight": 0.0, "coupling": "none", "c_schedule": "constant", "norm": "group",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SLCT(PixelRecipe):
    """Latent consistency training from scratch: iCT made robust by five additions, each a switch of its own.

    arXiv:2502.01441, on iCT (arXiv:2310.14189). The latents of a frozen autoencoder are standardised by channel to
    deviation 0.5. The network f learns that f(x + t_j z, t_j) = f(x + t_{j+1} z, t_{j+1}), the latter without gradient
    and with the same weights and dropout, on a grid that is refined from ``first_levels`` to ``last_levels``, weighted
    by 1 / (t_j - t_{j+1}). The additions: the Cauchy loss log(1 + m / (2 c^2)) of the mean square m (``loss_kind``); a
    diffusion loss on the least noisy quarter of the grid (``diffusion_weight``); noise coupled to the data by optimal
    transport within the batch, while the batch is prepared (``coupling``); a c that shrinks with the grid
    (``c_schedule``); layer normalisation without scales (``norm``). All off is iCT, the preset "ict".

    The model draws in one step, or in two with fresh noise at ``middle`` (`sfumato.sample.consistency`).

    Defaults are the authors' for CelebA-HQ 256. Cost of an update: two forward passes and one backward.

    Differs from the paper: the U-Net is this library's (mean pooling between levels, normalised queries and keys whose
    scale is kept). The coefficients of c are those of the authors' code, the axes of the blocks' normalisation were
    not seen there and are taken to be those of the output's. Coupling is within the rows that a process prepares at
    once, so it depends on ``accumulate``, as does the mean over the selected samples of the diffusion loss.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **PixelRecipe.EXAMPLE, "size": 16, "channels": (8, 8), "blocks": (1, 1), "attention": (1,), "head_dim": 8,
        "embedding": 16, "first_levels": 4, "last_levels": 8,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "celeba-hq-256": {"classes": False},
        "ffhq-256": {"classes": False, "updates": 766_000},
        "church-256": {"classes": False, "batch": 256, "updates": 888_000},
        "ict": _ICT,
        "small-sketch": {
            "size": 64, "channels": (64, 128), "blocks": (2, 2), "attention": (4,), "head_dim": 32, "embedding": 128,
            "batch": 64, "lr": 3e-4, "ema": 0.999, "updates": 10_000, "last_levels": 160,
        },
    }  # fmt: skip
    """``*-256``: the paper's, with its epochs (1,400; of churches 1,800) as updates by the sizes of the data sets;
    "ict": its baseline, all additions off; "small-sketch": for a CPU, untuned."""

    autoencoder: str = "sketch"
    """Whose latents: an embedded model, a folder of a pipeline or of an autoencoder, or a hub id."""
    size: Count = 256
    updates: Count = 330_000
    flip: bool = field(default=False, init=False)
    """Pictures are encoded once, as they are."""
    lr: Positive = 1e-4
    warmup: Natural = 0
    decay: Literal["cosine", "linear", "constant"] = "constant"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """RAdam's decays of the averaged gradient and of its square."""
    eps: NotNegative = 1e-4
    """RAdam's constant in the denominator."""
    weight_decay: NotNegative = 1e-4
    """RAdam's weight decay."""
    clip_norm: NotNegative = 0.0
    ema: Decay = 0.99993

    loss_kind: Literal["cauchy", "pseudo-huber", "geman-mcclure", "l2"] = "cauchy"
    """The distance between the two predictions."""
    reduction: Literal["mean", "sum", "element"] = "mean"
    """Of the mean square of a latent (the authors' code), its squared norm, or each element and averaged."""
    diffusion_weight: NotNegative = 5.0
    """Weight of the diffusion loss; 0: none."""
    diffusion_share: Share = 0.25
    """The share of the grid, from its clean end, that has a diffusion loss."""
    coupling: Literal["transport", "none"] = "transport"
    """Which noise goes with which latent of a batch: by optimal transport, or as they are drawn."""
    c_schedule: Literal["adaptive", "constant"] = "adaptive"
    """Whether the scale c of the loss shrinks as the grid is refined."""
    c0: Positive | None = None
    """c on the first grid; by default 0.00054 times the root of a latent's number of elements."""
    c_slope: Positive = 1.15
    """a of c = exp(-a ln(N - 1) - b)."""
    c_offset: float = 0.85
    """b of the same."""
    norm: Literal["nonscaling", "group"] = "nonscaling"
    """Layer normalisation without scales, or group normalisation."""
    norm_axes: Literal["sample", "channel"] = "sample"
    """What the former normalises over: a whole feature map, or the channels at each place."""

    first_levels: Annotated[int, at_least(2)] = 10
    """s0: intervals of the first grid."""
    last_levels: Annotated[int, at_least(2)] = 640
    """s1: intervals of the last."""
    p_mean: float = -1.1
    """Mean of the normal law of the logarithm of the noise level."""
    p_std: Positive = 2.0
    """Its standard deviation."""
    t_min: Annotated[float, at_least(5e-5)] = 0.002
    """The least noise level, at which the model is the identity."""
    t_max: Positive = 80.0
    """The highest."""
    rho: Positive = 7.0
    """The levels are equally far apart in t^(1 / rho)."""
    channels: tuple[Count, ...] = (128, 256, 384, 512)
    """Channels of the network's levels, each at half the side of the one before."""
    blocks: tuple[Natural, ...] = (4, 4, 4, 4)
    """Residual blocks of each, on the way down and again on the way up."""
    attention: tuple[Count, ...] = (16, 8)
    """Sides of feature maps with self-attention."""
    head_dim: Count = 64
    """Channels of an attention head."""
    embedding: Count = 512
    """Width of the embedding of noise level and class."""
    dropout: Decay = 0.0
    """Dropout in the residual blocks, with the same mask in both passes."""
    sampling_steps: Count = 1
    """Steps that the finished model draws in: one, two or more."""
    middle: Share = 0.375
    """Where the second of two steps begins, in [0, 1]: 0.375 is t = 0.743, index 400 of 640; 0.5 index 320."""

    prediction = "x0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_levels < self.first_levels:
            raise BadInput(f"last_levels ({self.last_levels}) must be at least first_levels ({self.first_levels})")
        if not 0 < self.middle < 1:
            raise BadInput(f"middle must lie between 0 and 1, got {self.middle}")
        if len(self.channels) != len(self.blocks):
            raise BadInput(f"{len(self.channels)} levels have channels and {len(self.blocks)} have blocks: give both")
        self.process()

    def process(self) -> GaussianProcess:
        return GaussianProcess(Karras(self.t_min, self.t_max, self.rho))

    def network(self, classes: int) -> ModelMixin:
        channels, side, _ = self.latent_shape
        return ConsistencyUNet(
            side, channels, classes, self.channels, self.blocks, self.attention, self.head_dim, self.embedding,
            self.dropout, self.norm, self.norm_axes, sigma_min=self.t_min,
        )  # fmt: skip

    @cached_property
    def _vae(self) -> Any:
        return open_autoencoder(self.autoencoder)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channel, height, width) of what the network sees."""
        return Codec(self._vae).latent_shape(self.size)

    def sampling(self) -> dict[str, Any]:
        return {
            "scheduler": "consistency", "options": {"middle": self.middle}, "sampling_steps": self.sampling_steps,
            "cfg_scale": 1.0, "clip": False,
        }  # fmt: skip

    def model(self, labels: tuple[str, ...]) -> LatentModel:
        shape, vae = self.latent_shape, copy.deepcopy(self._vae)  # whose configuration will have other statistics
        network = self.network(len(labels))
        return LatentModel(network, self.process(), self.prediction, shape, labels, self.sampling(), vae)

    def levels(self, step: int) -> int:
        """N at update ``step``, the points of the grid."""
        return levels_at(step, self.updates, self.first_levels, self.last_levels)

    def c(self, levels: int, dimensions: int) -> float:
        """The scale of the loss on a grid of that many points."""
        adaptive = self.c_schedule == "adaptive"
        return loss_scale(levels, dimensions, self.first_levels, self.c0, adaptive, self.c_slope, self.c_offset)

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        pictures = self.open()
        rows = pictures.identity()
        own = {**self.beyond(), "rows": rows}
        goes_on(out / "training", configuration(self.name(), self, own))
        torch.manual_seed(self.seed)
        model = self.model(self.labels_of(pictures))
        of = [self.data, self.seed, rows, self.size, weights_sha256({"vae": model.vae})]
        cache, precision = out / "latents.safetensors", resolved_precision(self.precision)
        latents = encode_all(model.vae, pictures, cache, json.dumps(of), precision, progress)
        latents = standardised(model.vae, latents)
        labels = torch.tensor([pictures.label(i) for i in range(len(pictures))]) if model.labels else None
        run = Run(SLCTTraining(self, model, latents, labels), self, out / "training", own)
        run.fit(progress)
        model.network.requires_grad_(False).eval()
        run.finish(lambda: model.save(out / "model", overwrite=overwrite, provenance=self.made()))


class SLCTTraining(PixelTraining):
    """`SLCT` as the loop sees it, on ``latents`` that are standardised already."""

    def __init__(
        self,
        recipe: SLCT,
        model: ImageModel,
        latents: Float[Tensor, "n channel height width"],
        labels: Int[Tensor, "n"] | None = None,
    ):
        rows: Any = latents  # in place of pictures
        super().__init__(recipe, model, rows)
        self.slct, self.latents, self.labels = recipe, latents, labels

    def turns(self) -> Sequence[Turn]:
        r = self.slct
        radam = partial(torch.optim.RAdam, betas=r.betas, eps=r.eps, weight_decay=r.weight_decay)
        return [Turn(name="all", loss=self.loss, optimizer=radam, lr=lambda step: learning_rate(r, step))]

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        """Latents and the noise that goes with them: on a GPU coupled in the thread that prepares batches ahead."""
        rows = draw.integers(len(self.latents), size, rng)
        dropped = draw.uniform(size, rng) < self.slct.label_dropout
        noise = draw.normal((size, *self.latents.shape[1:]), rng)
        if self.slct.coupling == "transport":
            rows = rows[couple(self.latents[rows], noise)]
        labels = None if self.labels is None else self.labels[rows].masked_fill(dropped, len(self.model.labels))
        return {"step": step, "x": self.latents[rows], "noise": noise, "labels": labels}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        r, denoiser, device = self.slct, self.model.denoiser, self.model.device
        x, noise = batch["x"].float().to(device), batch["noise"].to(device)
        cond = None if batch["labels"] is None else Labels(batch["labels"].to(device))
        n = r.levels(batch["step"])
        levels = noise_levels(n, r.t_min, r.t_max, r.rho)
        j = draw_indices(index_law(levels, r.p_mean, r.p_std), draw.uniform(len(x), rng))
        high, low = (levels[k].to(device, torch.float32) for k in (j, j + 1))
        # Equal steps in t^(1 / rho) are equal steps of the process's time.
        t, s = (1 - k.double() / (n - 1) for k in (j, j + 1))
        mask = int(torch.randint(2**31, (), generator=rng))
        with torch.no_grad(), draw.same_dropout(mask, device):
            target = denoiser(denoiser.process.diffuse(x, s, noise), s, cond).float()
        with draw.same_dropout(mask, device):
            guess = denoiser(denoiser.process.diffuse(x, t, noise), t, cond).float()
        difference, c = guess - target, r.c(n, x[0].numel())
        loss = (robust(difference, c, r.loss_kind, r.reduction) / (high - low)).mean()
        told = {"consistency": loss.detach(), "difference": difference.detach().square().mean().sqrt()}
        if r.diffusion_weight:
            early_loss = diffusion_loss(guess, x, high, early(j, n, r.diffusion_share).to(device))
            loss = loss + r.diffusion_weight * early_loss
            told["diffusion"] = early_loss.detach()
        return loss, told | {"levels": torch.tensor(float(n))}

    @torch.no_grad()
    def grid(self, rng: torch.Generator, n: int = 16) -> Float[Tensor, "n 3 height width"]:
        return self.recipe.grid(self.model, self.pictures, rng, n)
