"""What simple diffusion and SiD2 share: cosine schedules that follow the resolution, and ancestral sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sfumato.errors import BadInput
from sfumato.fields import Count, Positive, Share
from sfumato.noise import Cosine, GaussianProcess, Interpolated, Shifted

from .pixels import PixelRecipe


@dataclass(frozen=True, kw_only=True)
class CosineRecipe(PixelRecipe):
    """Fields of a recipe under a (shifted) cosine schedule; not a method itself."""

    noise: Literal["cosine", "shifted", "interpolated"] = "shifted"
    """How log-SNR follows time: plain cosine; moved to suit ``noise_size``; or, from noisy to clean times, moved to
    suit ``noise_size``, then ``clean_size``."""
    noise_size: Count = 32
    """Side whose pictures the plain cosine suits; larger pictures get as much more noise."""
    clean_size: Count | None = None
    """The same at the clean end of "interpolated"; by default the side of the pictures."""
    keep_bounds: bool = False
    """Keep the ends at plus and minus ``logsnr_limit``, instead of moving them with the schedule."""
    logsnr_limit: Positive = 15.0
    """Log-SNR at the clean end; minus this at the noisy one."""
    sampling_steps: Count = 512
    """Steps that the finished model samples in unless told otherwise."""
    cfg_scale: float = 1.0
    """Guidance that it samples with; 1 is none."""
    cfg_interval: tuple[float, float] | None = None
    """Log-SNRs between which it is guided, as in -1 3; everywhere by default."""
    variance: Share = 0.0
    """Where a sampling step's log-variance lies between the posterior's (0) and the forward step's (1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.process()
        if self.cfg_interval is not None and self.cfg_interval[0] >= self.cfg_interval[1]:
            raise BadInput(f"cfg_interval: two log-SNRs, the lower first, not {self.cfg_interval}")

    def process(self) -> GaussianProcess:
        base = Cosine(-self.logsnr_limit, self.logsnr_limit)
        if self.noise == "cosine":
            return GaussianProcess(base)
        if self.noise == "shifted":
            return GaussianProcess(Shifted(base, self.noise_size, self.size, self.keep_bounds))
        clean = self.clean_size or self.size
        return GaussianProcess(Interpolated(base, self.noise_size, clean, self.size, self.keep_bounds))

    def sampling(self) -> dict[str, Any]:
        return {
            "scheduler": "ddpm",
            "options": {"variance": self.variance} if self.variance else {},
            "sampling_steps": self.sampling_steps,
            "cfg_scale": self.cfg_scale,
            "cfg_interval": self.cfg_interval,
        }
