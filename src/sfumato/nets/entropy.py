"""How many bits quantised latents cost: Gaussian and factorised likelihoods, contexts, and tables of whole numbers.

The likelihoods and their bounds are those of arXiv:1802.01436 as CompressAI has them; the checkerboard is that of
arXiv:2103.15306.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

SCALE_BOUND = 0.11
"""Smaller scales count as this one."""
LIKELIHOOD_BOUND = 1e-9
"""Smaller likelihoods count as this one, about 30 bits."""
TAIL = 1e-9
"""Mass outside of a table, on both sides together."""
PRECISION = 24
"""The counts of a table sum to 2^24, what the range coder works in."""
HALF = 127
"""Half the width of the tables of a `FactorisedPrior`."""


class _LowerBound(torch.autograd.Function):
    """max(x, bound), with a gradient below the bound too where it leads up to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return gradient * ((x >= ctx.bound) | (gradient < 0)), None


def lower_bound(x: Float[Tensor, "*dims"], bound: float) -> Float[Tensor, "*dims"]:
    """max(x, bound); below the bound the gradient passes where a descent along it would raise x."""
    return _LowerBound.apply(x, bound)


def wide(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """``x`` in at least float32: differences of distribution functions are nothing in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def ste_round(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """x rounded, with the gradient of x (the straight-through estimator)."""
    return x + (x.round() - x).detach()


def gaussian_likelihood(
    values: Float[Tensor, "*dims"],
    scales: Float[Tensor, "*dims"],
    means: Float[Tensor, "*dims"] | float = 0.0,
    scale_bound: float = SCALE_BOUND,
    likelihood_bound: float = LIKELIHOOD_BOUND,
) -> Float[Tensor, "*dims"]:
    """The mass that N(means, scales^2) has within 1/2 of ``values``, rounded or with uniform noise on them.

    Phi((1/2 - d) / s) - Phi((-1/2 - d) / s), d = |value - mean|, s = max(scale, ``scale_bound``), at least
    ``likelihood_bound``: the difference is taken in the lower tail, where it keeps its digits.
    """
    distance, scales = (values - means).abs(), lower_bound(scales, scale_bound)
    upper, lower = (_normal_cdf((half - distance) / scales) for half in (0.5, -0.5))
    return lower_bound(upper - lower, likelihood_bound)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-math.sqrt(0.5) * x)


def bits(likelihood: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch"]:
    """-log2 of the likelihoods, summed over each sample."""
    return -likelihood.log2().flatten(1).sum(1)


class FactorisedPrior(nn.Module):
    """A density of its own for every channel, without any shape given: appendix 6.1 of arXiv:1802.01436.

    The logit of the distribution function is a small network, increasing in its input: matrices through a softplus,
    x + tanh(a) tanh(x) between them. ``median`` is learned beside it, see `median_loss`.

    Args:
        channels: how many densities.
        filters: widths of the hidden layers.
        init_scale: about how wide the densities are at first.
    """

    def __init__(self, channels: int, filters: Sequence[int] = (3, 3, 3, 3), init_scale: float = 10.0):
        super().__init__()
        widths = (1, *filters, 1)
        scale = init_scale ** (1 / (len(filters) + 1))
        self.matrices, self.biases, self.factors = (nn.ParameterList() for _ in range(3))
        for i in range(len(filters) + 1):
            start = math.log(math.expm1(1 / scale / widths[i + 1]))
            self.matrices.append(nn.Parameter(torch.full((channels, widths[i + 1], widths[i]), start)))
            self.biases.append(nn.Parameter(torch.rand(channels, widths[i + 1], 1) - 0.5))
            if i < len(filters):
                self.factors.append(nn.Parameter(torch.zeros(channels, widths[i + 1], 1)))
        self.median = nn.Parameter(torch.zeros(channels))

    def logits(self, x: Float[Tensor, "channel one n"], fixed: bool = False) -> Float[Tensor, "channel one n"]:
        """The logit of each channel's distribution function at ``x``; ``fixed``: without gradients for the density."""
        with torch.autocast(x.device.type, enabled=False):
            return self._logits(x, fixed)

    def _logits(self, x: Tensor, fixed: bool) -> Tensor:
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            used = [matrix, bias, *(self.factors[i : i + 1])]
            matrix, bias, *factor = (p.detach().to(x.dtype) if fixed else p.to(x.dtype) for p in used)
            x = F.softplus(matrix) @ x + bias
            if factor:
                x = x + torch.tanh(factor[0]) * torch.tanh(x)
        return x

    def likelihood(self, x: Float[Tensor, "batch channel *dims"]) -> Float[Tensor, "batch channel *dims"]:
        """The mass within 1/2 of ``x``, at least 1e-9."""
        rows = x.transpose(0, 1).flatten(1)[:, None]
        upper, lower = (torch.sigmoid(self.logits(rows + half)) for half in (0.5, -0.5))
        found = lower_bound(upper - lower, LIKELIHOOD_BOUND)
        return found.reshape(x.transpose(0, 1).shape).transpose(0, 1)

    def median_loss(self) -> Float[Tensor, ""]:
        """What draws ``median`` to the median, and changes nothing else: the sum of |logit| there."""
        return self.logits(self.median[:, None, None], fixed=True).abs().sum()

    def centre(self, ndim: int) -> Float[Tensor, "1 channel *ones"]:
        """The medians, to broadcast against a tensor with so many dimensions."""
        return self.median.view(1, -1, *[1] * (ndim - 2))

    @torch.no_grad()
    def counts(self, centre: Float[Tensor, "channel"]) -> Int[Tensor, "channel width"]:
        """Tables of the rounded values around ``centre``, see `tabulated`."""
        steps = torch.arange(-HALF, HALF + 1, dtype=torch.float64, device=centre.device)
        at = (centre.double()[:, None] + steps)[:, None]
        upper, lower = (torch.sigmoid(self.logits(at + half, fixed=True))[:, 0] for half in (0.5, -0.5))
        return tabulated(upper - lower)


def scale_table(low: float = SCALE_BOUND, high: float = 256.0, levels: int = 64) -> Float[Tensor, "levels"]:
    """Scales for which there are tables: geometric from ``low`` to ``high``, float64."""
    return torch.linspace(math.log(low), math.log(high), levels, dtype=torch.float64, device="cpu").exp()


def scale_index(scales: Float[Tensor, "*dims"], table: Float[Tensor, "levels"]) -> Int[Tensor, "*dims"]:
    """The first entry of ``table`` that is at least the scale; the last one where there is none."""
    return torch.searchsorted(table[:-1], scales.to(table).contiguous())


def gaussian_counts(table: Float[Tensor, "levels"]) -> Int[Tensor, "levels width"]:
    """Tables of a rounded normal variable of each scale, as far out as all but `TAIL` of it lies; see `tabulated`."""
    reach = -float(torch.special.ndtri(torch.tensor(TAIL / 2, dtype=torch.float64, device="cpu")))
    halves = [math.ceil(scale * reach) for scale in table.tolist()]
    width = 2 * max(halves) + 2
    rows = []
    for scale, half in zip(table.tolist(), halves, strict=True):
        distance = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu").abs()
        mass = _normal_cdf((0.5 - distance) / scale) - _normal_cdf((-0.5 - distance) / scale)
        rows.append(F.pad(tabulated(mass[None])[0], (0, width - 2 * half - 2)))
    return torch.stack(rows)


def tabulated(mass: Float[Tensor, "rows symbols"], precision: int = PRECISION) -> Int[Tensor, "rows symbols+1"]:
    """Whole numbers in proportion to ``mass``, at least 1, that sum to 2^precision in each row, int32.

    The last one is for what lies outside. What rounding leaves over goes to the largest.
    """
    outside = (1 - mass.sum(1, keepdim=True)).clamp(min=0)
    whole = torch.cat([mass, outside], dim=1).double()
    spare = 2**precision - whole.shape[1]
    counts = (whole / whole.sum(1, keepdim=True) * spare).floor().long() + 1
    rest = 2**precision - counts.sum(1, keepdim=True)
    return counts.scatter_add(1, counts.argmax(1, keepdim=True), rest).int()


def checkerboard(height: int, width: int, device: Any = None) -> Bool[Tensor, "height width"]:
    """Where the first pass of a group is: row + column even."""
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    return (rows + columns) % 2 == 0


class CheckerboardConv2d(nn.Conv2d):
    """A convolution that at places of one colour of the checkerboard sees those of the other only."""

    @property
    def masked(self) -> Float[Tensor, "out inside k k"]:
        """The weights, zero where the tap is of the place's own colour."""
        height, width = self.kernel_size
        return self.weight * ~checkerboard(height, width, self.weight.device)

    def forward(self, x: Float[Tensor, "batch inside height width"]) -> Float[Tensor, "batch out height width"]:
        return F.conv2d(x, self.masked, self.bias, self.stride, self.padding)
