"""HFD: a codec for squared error, and a diffusion decoder that makes its blurred pictures real (arXiv:2305.18231)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import ModelMixin
from jaxtyping import Float
from torch import Tensor

from sfumato.data.pictures import Pictures
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, Positive, within
from sfumato.nets import Elic, RestoringUNet
from sfumato.noise import Bounded, Cosine, Denoiser, GaussianProcess, RectifiedFlow, Shifted
from sfumato.noise import Schedule as NoiseSchedule
from sfumato.noise.process import Prediction
from sfumato.pipeline import CompressionModel, Degraded
from sfumato.plan import Plan

from . import draw
from .codec import CodecRecipe, cropped
from .loop import Run
from .pixels import PixelRecipe, PixelTraining
from .schedule import Schedule
from .state import configuration, goes_on, rows_of

LIMIT = 15.0
"""Log-SNRs are held to plus and minus this."""


@dataclass(frozen=True, kw_only=True)
class HFD(PixelRecipe):
    """High-fidelity compression: stage 1 trains a codec for rate and MSE, stage 2 draws real pictures given its own.

    arXiv:2305.18231. Stage 1: an ELIC codec (arXiv:2203.10886), R + lam 255^2 MSE, uniform noise on the latents for the
    rate, straight-through rounding for the picture; frozen then, with its tables written down. Stage 2: a U-Net of
    convolutions, told x_mse = clip(g_s(round(y))) at every pixel and nothing else of the codec. "diffusion": v of a
    variance-preserving process whose log-SNR is the cosine's plus ``shift``, so less noisy, since the coarse content is
    known; loss mean((eps - (sigma z + alpha v))^2); ancestral sampling. "flow": eps - x of u = (1 - t) x + t eps, in
    Euler steps (HFD/RF), better in few steps. `sfumato compress` and `sfumato decompress` use the result; its rate is
    the codec's, and perfect realism costs 3.01 dB against x_mse at the most.

    Unconfirmed: the value of ``shift`` (to be swept in 0, 2, 4, 6), lam, crops, batches, updates, learning rates, steps
    and the size of the U-Net; the preset "paper" has what is typical. Reconstructed: how tiles of large pictures are
    joined (`sfumato.sample.tiles`).
    Differs from the paper: the log-SNR is clamped to +-15, as a later training code has it. One decoder serves one
    rate: it is not told the rate, which it could be to serve several.
    Cost: stage 1 a call of the codec with gradients, stage 2 one of the U-Net and one of the codec without, per update;
    decoding ``sampling_steps`` calls of the U-Net at full resolution.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **PixelRecipe.EXAMPLE, "size": 64, "lam": 0.01, "codec_updates": 2, "codec_batch": 2, "codec_width": 4,
        "codec_latent": 6, "codec_groups": (2, 4), "codec_context": (6, 4), "codec_blocks": 1, "channels": (8, 8),
        "blocks": (1, 1), "embedding": 16, "sampling_steps": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "size": 512, "crop": 256, "flip": True, "codec_updates": 2_000_000, "channels": (128, 256, 512, 1024),
            "blocks": (2, 2, 4, 8), "embedding": 1024, "batch": 256, "precision": "bf16", "updates": 1_000_000,
            "warmup": 10_000,
        },
        "flow": {"decoder": "flow", "sampling_steps": 20},
        "small-sketch": {
            "size": 64, "codec_width": 48, "codec_latent": 64, "codec_groups": (8, 8, 16, 32),
            "codec_context": (48, 32), "codec_blocks": 1, "codec_attention": False, "codec_updates": 6000,
            "codec_lr": 5e-4, "channels": (48, 96, 96), "blocks": (1, 1, 2), "batch": 32, "lr": 1e-3, "warmup": 200,
            "ema": 0.999, "updates": 6000, "sampling_steps": 50,
        },
        "tiny-photos": {
            "size": 256, "crop": 128, "flip": True, "codec_width": 48, "codec_latent": 64,
            "codec_groups": (8, 8, 16, 32), "codec_context": (48, 32), "codec_blocks": 1, "codec_attention": False,
            "codec_updates": 10_000, "codec_batch": 4, "codec_lr": 5e-4, "channels": (24, 48, 48), "blocks": (1, 1, 1),
            "embedding": 128, "batch": 4, "lr": 1e-3, "warmup": 100, "ema": 0.999, "updates": 6000,
            "sampling_steps": 30,
        },
    }  # fmt: skip
    """"paper": of the paper's kind, untested at that size; "flow": HFD/RF; "small-sketch", and "tiny-photos" on squares
    of photographs: for a CPU, untuned."""

    classes: ClassVar[bool] = False  # type: ignore[misc]  # pictures are what it is told
    label_dropout: ClassVar[float] = 0.0  # type: ignore[misc]  # x_mse is never left out: there is no guidance
    size: Count = 256
    """Side of the pictures in pixels, as they are read."""
    crop: Count | None = None
    """Side of the squares of them that are trained on, a multiple of 64; by default whole pictures. Squares of 64 hold
    one hyper-latent: what neighbours say of each other is not learned, and larger pictures take more bits than due."""
    lam: Positive = 0.0067
    """Weight of the squared error against the bits: larger for more bits and sharper pictures."""
    codec_updates: Count = 200_000
    """Updates of the first stage."""
    codec_batch: Count = 8
    """Pictures in an update of the first stage."""
    codec_lr: Positive = 1e-4
    """Highest learning rate of the first stage."""
    codec_ema: Decay = 0.999
    """Decay of the averaged weights of the first stage."""
    codec_width: Count = 192
    """Channels of the codec's networks (N)."""
    codec_latent: Count = 320
    """Channels of its latents (M)."""
    codec_groups: tuple[Count, ...] = (16, 16, 32, 64, 192)
    """Channels of each group of latents, coded one after the other; they sum to codec_latent."""
    codec_context: tuple[Count, Count] = (224, 128)
    """Channels inside of what groups tell the next one."""
    codec_blocks: Natural = 3
    """Residual blocks after each of the codec's first three convolutions."""
    codec_attention: bool = True
    """Gates ("attention") in the codec."""
    hyper: bool = True
    """A hyper-prior and contexts; without, a factorised prior, for a very small codec."""
    decoder: Literal["diffusion", "flow"] = "diffusion"
    """How pictures are drawn: ancestral diffusion, or a rectified flow in Euler steps."""
    shift: Annotated[float, within(-40, 40)] | None = None
    """What is added to the log-SNR at every time; by default 2 for diffusion, and 0 for the flow, as published."""
    channels: tuple[Count, ...] = (64, 128, 256)
    """Channels of the U-Net's levels, the finest first."""
    blocks: tuple[Natural, ...] = (2, 2, 4)
    """Residual blocks of each, on the way down and again on the way up."""
    embedding: Count = 256
    """Width of the embedding of the log-SNR."""
    save_memory: bool = False
    """Compute the U-Net's activations twice instead of keeping them."""
    sampling_steps: Count = 250
    """Steps that the finished model draws in unless told otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop is not None and self.crop > self.size:
            raise BadInput(f"crop ({self.crop}) cannot be larger than size ({self.size})")
        due = max(64 if self.hyper else 16, 2 ** (len(self.channels) - 1))
        if self.side % due:
            raise BadInput(f"size, or crop, must be a multiple of {due} for these networks: got {self.side}")
        if len(self.channels) != len(self.blocks):
            raise BadInput(f"give one number of blocks a level: {len(self.channels)}, not {len(self.blocks)}")

    @property
    def side(self) -> int:
        """Side of what is trained on."""
        return self.crop or self.size

    @property
    def prediction(self) -> Prediction:
        return "v" if self.decoder == "diffusion" else "flow"

    def process(self) -> GaussianProcess:
        shift = self.shift if self.shift is not None else 2.0 if self.decoder == "diffusion" else 0.0
        return GaussianProcess(less_noisy(shift) if self.decoder == "diffusion" else straight(shift))

    def codec(self) -> Elic:
        """A fresh codec."""
        return Elic(
            self.codec_width, self.codec_latent, self.codec_groups, self.codec_context, self.codec_blocks,
            self.codec_attention, self.hyper,
        )  # fmt: skip

    def network(self, classes: int) -> ModelMixin:
        net = RestoringUNet(3, self.channels, self.blocks, self.embedding)
        if self.save_memory:
            net.enable_gradient_checkpointing()
        return net

    def loss(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, eps: Tensor, cond: Any
    ) -> Float[Tensor, "batch"]:
        if self.decoder == "diffusion":
            return super().loss(denoiser, x, t, eps, cond)
        guess = denoiser(denoiser.process.diffuse(x, t, eps), t, cond)
        return (eps - x - guess).square().flatten(1).mean(1)

    def sampling(self) -> dict[str, Any]:
        return {"scheduler": "ddpm" if self.decoder == "diffusion" else "ddim", "sampling_steps": self.sampling_steps}

    def model(self, labels: tuple[str, ...], codec: Elic | None = None) -> CompressionModel:
        shape = (3, self.side, self.side)
        network, process = self.network(0), self.process()
        return CompressionModel(
            network, process, self.prediction, shape, (), self.sampling(), codec or self.codec().eval()
        )

    @torch.no_grad()
    def plan(self) -> Plan:
        """Memory and time of both stages, from one forward pass of each network."""
        second, codec = super().plan(), self.codec()
        began = time.perf_counter()
        codec(torch.zeros(1, 3, self.side, self.side))
        seconds = 3 * self.codec_batch * self.codec_updates * (time.perf_counter() - began)
        weights = 4 * sum(p.numel() for p in codec.parameters())
        memory = {**second.memory, "codec": weights}
        return replace(second, memory=memory, seconds=second.seconds + seconds)

    def grid(self, model: Any, pictures: Pictures, rng: torch.Generator, n: int) -> Float[Tensor, "n 3 h w"]:
        """Pictures of the data as they come back."""
        rows = torch.randint(len(pictures), (n,), generator=rng).tolist()
        x_mse = model.reconstruct(cropped(pictures, rows, self.crop, rng))
        steps = min(50, model.defaults["sampling_steps"])
        return model.draw(None, rows, sampling_steps=steps, cond=Degraded(x_mse))

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        pictures = self.open()
        rows = rows_of(self.data, pictures)
        first, keys, own = self._first(), {**self._first_keys(), **rows}, {**self.beyond(), **rows}
        if self.hyper and self.crop == 64:
            told = "squares of 64 pixels hold one hyper-latent: larger pictures will take more bits than they need"
            warnings.warn(f"{told}; use --crop 128 or more", stacklevel=2)
        goes_on(out / "codec", configuration(CodecRecipe.name, first, keys))
        goes_on(out / "training", configuration(self.name(), self, own))
        torch.manual_seed(self.seed)
        codec = self.codec()
        Run(CodecRecipe(codec, pictures, self.crop, self.lam, self.flip), first, out / "codec", keys).fit(progress)
        codec.requires_grad_(False).eval().freeze()
        # Whether the first stage was done just now or before a kill must not matter.
        torch.manual_seed(self.seed + 1)
        model = self.model((), codec)
        run = Run(HFDTraining(self, model, pictures), self, out / "training", own)
        run.fit(progress)
        model.network.eval()
        run.finish(lambda: model.save(out / "model", overwrite=overwrite, provenance=self.made()))

    def _first(self) -> Schedule:
        shared = ("warmup", "weight_decay", "precision", "seed", "checkpoint_every", "compile", "track")
        names = {"updates": "codec_updates", "batch": "codec_batch", "lr": "codec_lr", "ema": "codec_ema"}
        return Schedule(**{name: getattr(self, names.get(name, name)) for name in (*names, *shared)})

    def _first_keys(self) -> dict[str, Any]:
        """What shapes the first stage, apart from its schedule."""
        codec = {n: value for n, value in self.beyond().items() if n.startswith("codec_")}
        return {**codec, **{n: getattr(self, n) for n in ("data", "pictures", "size", "crop", "flip", "lam", "hyper")}}


class HFDTraining(PixelTraining):
    """The second stage of `HFD` as the loop sees it: the codec is frozen, and asked anew for every crop."""

    def __init__(self, recipe: HFD, model: CompressionModel, pictures: Pictures):
        super().__init__(recipe, model, pictures)
        self.hfd, self.shown = recipe, model

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        rows = draw.integers(len(self.pictures), size, rng).tolist()
        x = cropped(self.pictures, rows, self.hfd.crop, rng)
        if self.hfd.flip:
            x = torch.where((draw.uniform(size, rng) < 0.5).reshape(-1, 1, 1, 1), x.flip(-1), x)
        return {"x": x}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.model.device
        x = batch["x"].to(device)
        self.shown.codec.to(device)
        told: Any = Degraded(self.shown.codec.reconstruct(x).float())
        t = self.recipe.times(len(x), rng).to(device)
        eps = draw.normal(x.shape, rng).to(device)
        return self.recipe.loss(self.model.denoiser, x, t, eps, told).mean(), {}


def less_noisy(shift: float) -> NoiseSchedule:
    """lambda(t) = -2 log tan(pi t / 2) + shift, held to +-15: the cosine schedule with less noise for shift > 0.

    -2 (log tan(pi t / 2) + log n) with n = exp(-shift / 2): 0.5 is a shift of 1.39, 0.125 one of 4.16. For a picture of
    side d it is simple diffusion's schedule (arXiv:2301.11093) for a ``noise_size`` of d exp(shift / 2).
    """
    return Bounded(Shifted(Cosine(-60.0, 60.0), math.exp(shift / 2), 1.0), -LIMIT, LIMIT)  # 60: no bound at all


def straight(shift: float) -> NoiseSchedule:
    """The rectified flow's u = (1 - sigma) x + sigma eps, sigma = t for a shift of 0, with so much more log-SNR."""
    return RectifiedFlow(math.exp(-shift / 2))
