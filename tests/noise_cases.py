"""Schedules, processes and drawn times that the tests of noise and samplers share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from hypothesis import strategies as st

from sfumato.noise import (
    Bounded,
    Cosine,
    DiscreteSchedule,
    GaussianProcess,
    Interpolated,
    Karras,
    LinearBeta,
    RectifiedFlow,
    ScaledLinearBeta,
    Shifted,
)
from sfumato.noise.process import pad_right

IDEAL = Cosine(-math.inf, math.inf)
SCHEDULES = {
    "cosine": Cosine(),
    "cosine-10": Cosine(-10.0, 10.0),
    "shifted": Shifted(Cosine(), 32, 64),
    "shifted-bounds-kept": Shifted(Cosine(), 32, 64, keep_bounds=True),
    "interpolated": Interpolated(Cosine(), 32, 512, 512),
    "interpolated-bounds-kept": Interpolated(Cosine(), 32, 512, 512, keep_bounds=True),
    "bounded-last": Bounded(Interpolated(IDEAL, 32, 128, 128)),
    "linear": LinearBeta(),
    "scaled-linear": ScaledLinearBeta(),
    "linear-table": LinearBeta().discrete(),
    "scaled-linear-table": ScaledLinearBeta().discrete(),
    "zero-snr-table": DiscreteSchedule.from_alphas_cumprod(
        DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod
    ),
    "karras": Karras(),
    "karras-negative": Karras(rho=-10.0),
    "flow": RectifiedFlow(),
    "flow-shifted": RectifiedFlow(3.0),
}
PROCESSES = {name: GaussianProcess(schedule) for name, schedule in SCHEDULES.items()}
PROCESSES["cosine-as-flow"] = GaussianProcess(Cosine(), path="flow")
PROCESSES["flow-as-ve"] = GaussianProcess(RectifiedFlow(), path="ve")

processes = st.sampled_from(sorted(PROCESSES)).map(PROCESSES.get)
# Away from the ends, where 1 / alpha and 1 / sigma would magnify rounding beyond any fixed tolerance.
inner_times = st.floats(0.03, 0.97)


@st.composite
def ordered_times(draw, count: int = 2) -> tuple[float, ...]:
    """Distinct inner times, ascending, at least 1e-3 apart."""
    gaps = draw(st.lists(st.floats(0.01, 1), min_size=count + 1, max_size=count + 1))
    total = sum(gaps)
    positions = [sum(gaps[: i + 1]) / total for i in range(count)]
    return tuple(0.03 + 0.94 * p for p in positions)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass(frozen=True)
class Blur(GaussianProcess):
    """A process with one alpha per frequency (arXiv:2209.05557), as short as the seam allows it to be."""

    size: int = 4
    strength: float = 3.0

    @property
    def dct(self) -> torch.Tensor:
        k = torch.arange(self.size, dtype=torch.float64)
        matrix = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / self.size) * math.sqrt(2 / self.size)
        return torch.cat([matrix[:1] / math.sqrt(2), matrix[1:]])

    def log_alpha_sigma(self, t, like=None):
        log_alpha, log_sigma = super().log_alpha_sigma(t, like)
        frequency = (math.pi * torch.arange(self.size, dtype=torch.float64) / self.size) ** 2
        level = pad_right(torch.as_tensor(t, dtype=torch.float64), like.ndim if like is not None else 0)
        blur = self.strength * torch.sin(math.pi * level / 2) ** 2
        decay = (frequency[:, None] + frequency) * blur**2 / 2
        return log_alpha + torch.log(0.999 * torch.exp(-decay) + 0.001), log_sigma

    def to_basis(self, x):
        return self.dct @ x @ self.dct.T

    def from_basis(self, u):
        return self.dct.T @ u @ self.dct
