"""Rolling Diffusion: sequences of any length from a window in which later frames carry more noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from diffusers import ModelMixin
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.data.frames import Frames, open_frames, stack
from sfumato.fields import Count, Decay, Natural, Share
from sfumato.nets import VideoUNet
from sfumato.noise import Cosine, Denoiser, GaussianProcess, Shifted, Window
from sfumato.noise.process import compose
from sfumato.pipeline import VideoModel

from .pixels import PixelRecipe


@dataclass(frozen=True, kw_only=True)
class Rolling(PixelRecipe):
    """Rolling Diffusion Models: every frame of a window has its own diffusion time, later frames later times.

    arXiv:2402.09470. Local times (sections 3.2 and 3.3): `sfumato.noise.Window`. Loss (section 3.4): with t uniform in
    [0, 1], and the times of the init phase for a share of the batch, else those of the rolling phase, the mean over
    generated frames of a(t_k) |x_k - x_hat_k(z)|^2, where frames that do not move are left out. The weight a is that of
    the plain error of v or of the noise. ``frame_times="standard"`` is ordinary video diffusion with the same network,
    one time for all generated frames: the paper's baseline.

    The trained model rolls out: ``model.rollout(seeds, context, n_frames)``, or ``sfumato rollout``.
    Differs from the paper: which of the two weights it uses, the share of init phases and the optimiser are not
    confirmed by a source at hand; the network is a small U-Net instead of a U-ViT of a billion parameters.
    Cost: one network call with gradients on the whole window per update.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **PixelRecipe.EXAMPLE, "window": 4, "context": 0, "channels": (8, 16), "layers": 1, "head_dim": 8,
        "embedding": 16, "sampling_steps": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "kolmogorov": {"data": "kolmogorov", "periodic": True},
        "kolmogorov-small": {
            "data": "kolmogorov", "periodic": True, "size": 16, "window": 6, "channels": (32, 64), "layers": 1,
            "patch": 2, "head_dim": 16, "embedding": 64, "batch": 16, "lr": 1e-3, "warmup": 50, "updates": 1000,
            "ema": 0.99, "sampling_steps": 4,
        },
    }  # fmt: skip
    """Settings of ours, for small machines; the paper's networks are a hundred times as large."""

    data: str = "sketch"
    """"sketch", "kolmogorov" (a chaotic fluid), or a folder with a subfolder of frames for each sequence."""
    pictures: Count = 10_000
    """How many clips of the sketch world to draw."""
    batch: Count = 32
    """Windows in an update."""
    window: Count = 8
    """Frames of the window, W."""
    context: Natural = 2
    """Clean frames that the window begins with, n."""
    frame_times: Literal["rolling", "standard"] = "rolling"
    """How noise grows along the window: frame by frame, or not at all (ordinary video diffusion)."""
    init_share: Share = 0.1
    """Share of the updates spent on the init phase, beta; without it the first window is new to the network."""
    mask_waiting: bool = True
    """Leave frames that wait at time 1 in the init phase out of the loss, as the bound on the likelihood does."""
    weighting: Literal["v", "eps"] = "v"
    """Whose plain error is minimised."""
    noise_size: Count | None = None
    """Side of the frames that the cosine schedule suits as it is; larger frames get more noise. None: any side."""
    channels: tuple[Count, ...] = (64, 128, 256)
    """Channels of the network's levels, each at half the side of the one before."""
    layers: Count = 2
    """Residual blocks a level, down and again up."""
    patch: Count = 1
    """Side of the squares of pixels that become one place of the network."""
    head_dim: Count = 32
    """Channels of an attention head."""
    embedding: Count = 256
    """Width of the embedding of log-SNR and place in the window."""
    dropout: Decay = 0.0
    """Dropout at the network's last level."""
    periodic: bool = False
    """Frames wrap around at their borders, as the fluid's do."""
    sampling_steps: Count = 16
    """Network calls for each frame that the finished model samples with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.places  # noqa: B018  (raises what is wrong with it)

    @property
    def places(self) -> Window:
        """The window."""
        return Window(self.window, self.context)

    @cached_property
    def _frames(self) -> Frames:
        return open_frames(self.data, self.size, self.window, seed=self.seed, count=self.pictures, progress=True)

    def open(self) -> Frames:
        return self._frames

    def read(self, pictures: Frames, rows: list[int]) -> Float[Tensor, "row frame channel height width"]:
        return stack(pictures, rows)

    def process(self) -> GaussianProcess:
        return GaussianProcess(Cosine() if self.noise_size is None else Shifted(Cosine(), self.noise_size, self.size))

    def network(self, classes: int) -> ModelMixin:
        return VideoUNet(
            self.size, self.window, self.open().channels, classes, self.channels, self.layers, self.patch,
            self.head_dim, self.embedding, self.dropout, self.periodic,
        )  # fmt: skip

    def model(self, labels: tuple[str, ...]) -> VideoModel:
        shape = (self.window, self.open().channels, self.size, self.size)
        return VideoModel(self.network(len(labels)), self.process(), self.prediction, shape, labels, self.sampling())

    def sampling(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "schedule": self.frame_times,
            "sampling_steps": self.sampling_steps,
            "clip": self.open().bounded,
        }

    def local(self, t: Float[Tensor, "batch"]) -> tuple[Float[Tensor, "batch frame"], Bool[Tensor, "batch frame"]]:
        """Times of the frames for uniform ``t``, and which frames the loss counts.

        One number decides phase and time: the lowest ``init_share`` of [0, 1], stretched to [0, 1], are the times of
        the init phase, so that batches of times that cover [0, 1] evenly cover both phases evenly.
        """
        window, share = self.places, self.init_share
        if self.frame_times == "standard":
            return window.times("standard", t), window.moving("standard", t)
        init = t < share
        t = torch.where(init, t / max(share, 1e-12), (t - share) / max(1 - share, 1e-12))
        times = torch.where(init[:, None], window.times("init", t), window.times("rolling", t))
        counted = window.moving("init", t) if self.mask_waiting else torch.arange(self.window) >= self.context
        return times, torch.where(init[:, None], counted.to(t.device), window.moving("rolling", t))

    def loss(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "batch frame channel height width"],
        t: Float[Tensor, "batch"],
        eps: Float[Tensor, "batch frame channel height width"],
        cond: None = None,
    ) -> Float[Tensor, "batch"]:
        process, (times, counted) = denoiser.process, self.local(t)
        z = process.diffuse(x, times, eps)
        guess = process.convert(denoiser(z, times, cond), z, times, denoiser.prediction, self.weighting)
        error = (guess - compose(x, eps, *process.alpha_sigma(times, x), self.weighting)).square().flatten(2).mean(2)
        return torch.where(counted, error, 0.0).sum(1) / self.places.noisy

    def grid(self, model: VideoModel, pictures: Frames, rng: torch.Generator, n: int) -> Float[Tensor, "n 3 h w"]:
        """Four sequences, a row each: the last frame of the context, and frames after it."""
        rows = torch.randint(len(pictures), (4,), generator=rng).tolist()
        clips, seeds = self.read(pictures, rows), torch.randint(2**31, (4,), generator=rng).tolist()
        drawn = model.draw(clips, seeds, n_frames=max(1, n // 4 - 1))
        shown = torch.cat([((clips[:, -1:] + 1) / 2).clamp(0, 1), drawn], dim=1).flatten(0, 1)
        return shown.expand(-1, 3, -1, -1)

