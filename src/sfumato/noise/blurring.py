"""Blurring diffusion: a Gaussian process whose signal fades frequency by frequency (arXiv:2209.05557).

    z_t = V alpha_t V^T x0 + sigma_t eps,  alpha_t = a_t d_t,  d_t = (1 - d_min) exp(-lambda tau_t) + d_min

V^T is the orthonormal two-dimensional cosine transform (DCT-II), lambda_ij = (pi i / H)^2 + (pi j / W)^2 the
frequencies, tau_t = sigma_B(t)^2 / 2 the dissipation time and sigma_B(t) = sigma_blur_max sin^2(pi t / 2) the standard
deviation of the blur in pixels (section 4 of the paper, and the pseudo-code in its appendix). a_t and sigma_t are
scalars and come from a schedule; the paper's is ``Cosine(-10, 10)``. High frequencies are destroyed first, so they are
restored last.

Everything is elementwise in the cosine basis, so marginals, transitions, posterior and every
sampler are those of `GaussianProcess`, with one alpha per frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from .process import GaussianProcess, pad_right
from .schedule import Cosine, Schedule, Time, float64


@lru_cache(maxsize=64)
def dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "size size"]:
    """The orthonormal DCT-II of ``size`` points: row k is the cosine of frequency pi k / size."""
    # A tensor born in inference mode could never be trained through, and the cache outlives the mode.
    with torch.inference_mode(False), torch.no_grad():
        k = torch.arange(size, dtype=torch.float64)
        matrix = torch.cos(math.pi * (k + 0.5) * k[:, None] / size) * math.sqrt(2 / size)
        matrix[0] /= math.sqrt(2)
        return matrix.to(device, dtype)


def dct(x: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width"]:
    """The orthonormal two-dimensional DCT-II over the last two dimensions.

    Two matrix products, which suit the sides of pictures better than an FFT, and are exact for odd sizes too. In
    float32 at least, whatever the type of ``x`` and the ambient autocast: half precision breaks the isotropy of noise.
    """
    return _transform(x, inverse=False)


def idct(u: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width"]:
    """The inverse of `dct`, which is its transpose."""
    return _transform(u, inverse=True)


def _transform(x: Tensor, inverse: bool) -> Tensor:
    if x.ndim < 3:
        raise BadInput(f"blurring acts on pictures [..., height, width], got shape {tuple(x.shape)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (dct_matrix(n, dtype, x.device) for n in x.shape[-2:])
    if inverse:
        rows, columns = rows.T, columns.T
    with torch.autocast(x.device.type, enabled=False):
        return (rows @ (x.to(dtype) @ columns.T)).to(x.dtype)


def frequencies(height: int, width: int, device: torch.device | None = None) -> Float[Tensor, "height width"]:
    """lambda_ij = (pi i / height)^2 + (pi j / width)^2 in float64: what heat dissipation multiplies time by."""
    y, x = (math.pi * torch.arange(n, dtype=torch.float64, device=device) / n for n in (height, width))
    return y[:, None] ** 2 + x**2


@dataclass(frozen=True)
class Constant(Schedule):
    """The same log-SNR at all times: for processes that destroy the picture by something else than noise."""

    value: float
    path = "ve"

    def logsnr(self, t: Time) -> Float[Tensor, "..."]:
        return torch.full_like(float64(t), self.value)

    def dlogsnr_dt(self, t: Time) -> Float[Tensor, "..."]:
        return torch.zeros_like(float64(t))

    def time(self, logsnr: Time) -> Float[Tensor, "..."]:
        raise BadInput("a constant log-SNR tells no times apart: choose a grid that is uniform in t")

    def level(self, t: Time) -> Float[Tensor, "..."]:
        return Cosine().logsnr(t)


@dataclass(frozen=True)
class BlurringProcess(GaussianProcess):
    """Blur and isotropic noise at once, for pictures [..., height, width] of any size.

    ``sigma_blur_max`` is the largest blur, in pixels: 0 is the plain `GaussianProcess` (the paper takes 20 for 32 and
    for 128 pixels a side). ``d_min`` is what is left of the highest frequencies, so that alpha_t / alpha_s stays
    tame. `heat` is the other end of the family, dissipation under constant noise.

    A time is one number, or one per picture or frame. Without pictures to say how many frequencies there are,
    `log_alpha_sigma` and what follows from it speak of frequency zero: the mean intensity, which never blurs.

    Differs from the pseudo-code: no small constants in the posterior. Coefficients are computed from logarithms in
    float64, where nothing needs them, and where two frequencies' alphas agree the step is the identity exactly.
    """

    sigma_blur_max: float = 20.0
    d_min: float = 0.001

    def __post_init__(self) -> None:
        if self.sigma_blur_max < 0 or not 0 <= self.d_min <= 1:
            raise BadInput(
                f"need sigma_blur_max >= 0 and d_min in [0, 1]; got {self.sigma_blur_max} and {self.d_min}"
            )

    @classmethod
    def heat(cls, sigma: float = 0.01, sigma_blur_max: float = 20.0, d_min: float = 0.001) -> BlurringProcess:
        """Inverse heat dissipation (arXiv:2206.13397) as a diffusion: a_t = 1 and the same ``sigma`` at all times.

        The prior is a blurred picture plus that noise, not pure noise. Differs from that paper, whose sampler adds
        fixed noise, in the exact posterior, whose variance is sigma^2 (1 - alpha_ts^2) at each frequency.
        """
        if sigma <= 0:
            raise BadInput(f"sigma must be positive, got {sigma}")
        return cls(Constant(-2 * math.log(sigma)), None, sigma_blur_max, d_min)

    def sigma_blur(self, t: Time) -> Float[Tensor, "..."]:
        """Standard deviation of the blur in pixels: sigma_blur_max sin^2(pi t / 2)."""
        return self.sigma_blur_max * torch.sin(math.pi * float64(t) / 2) ** 2

    def log_scaling(self, t: Time, like: Float[Tensor, "... height width"]) -> Float[Tensor, "..."]:
        """log(d_t), what blurring leaves of each frequency, in float64; broadcastable against ``like``.

        Raises:
            BadInput: data that are no pictures, or a time of its own for every pixel.
        """
        if like.ndim < 3:
            raise BadInput(f"blurring acts on pictures [..., height, width], got shape {tuple(like.shape)}")
        sigma = pad_right(self.sigma_blur(t), like.ndim)
        if sigma.ndim and sigma.shape[-2:] != (1, 1):
            raise BadInput("a blurred picture has one time, not one for every pixel")
        height, width = like.shape[-2:]
        x = frequencies(height, width, sigma.device) * sigma**2 / 2
        if self.d_min == 0:
            return -x
        # The first form is exact at frequency zero, the second keeps its digits where d_t is close to d_min.
        near = torch.log1p((1 - self.d_min) * torch.expm1(-x))
        log_min = torch.full_like(x, math.log(self.d_min))
        rest = math.log1p(-self.d_min) if self.d_min < 1 else -math.inf
        return torch.where(x < 1, near, torch.logaddexp(rest - x, log_min))

    def log_alpha_sigma(self, t: Time, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_alpha, log_sigma = super().log_alpha_sigma(t, like)
        return (log_alpha if like is None else log_alpha + self.log_scaling(t, like)), log_sigma

    def to_basis(self, x: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        return dct(x)

    def from_basis(self, u: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        return idct(u)

    def clamp(self, x: Float[Tensor, "batch *dims"], low: float, high: float) -> Float[Tensor, "batch *dims"]:
        """Each frequency of ``x`` held to what pictures within [low, high] can have of it.

        Not the pixels, unless nothing is blurred: errors of high frequencies are divided by an alpha near ``d_min``,
        and cutting off the pixels that they dominate would take the low frequencies away with them.
        """
        if self.sigma_blur_max == 0:
            return super().clamp(x, low, high)
        middle, reach = (low + high) / 2, (high - low) / 2 * _largest(x)
        return idct(dct(x - middle).clamp(-reach, reach)) + middle


def _largest(like: Float[Tensor, "... height width"]) -> Float[Tensor, "height width"]:
    """The largest coefficient of each frequency that pictures within [-1, 1] have: the sum of |basis|."""
    rows, columns = (dct_matrix(n, like.dtype, like.device).abs().sum(1) for n in like.shape[-2:])
    return rows[:, None] * columns
