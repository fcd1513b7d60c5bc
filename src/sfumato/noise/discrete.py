"""Tokens destroyed in continuous time: absorbing, uniform and Gaussian-like Markov chains, exactly.

Every token changes by itself, by a chain whose rates are I'(t) Q; so q_t = exp(I(t) Q), with rows = from and columns =
to. Time is in [0, 1], 1 = noise, a number or one for each row of a batch; matrices come in float64. Rates and kernels:
arXiv:2205.14987 (tau-LDR), with the settings of its code; see `sfumato.noise.denoiser` for what the kinds of
predictions are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from ..errors import BadInput
from .denoiser import DiscretePrediction
from .schedule import Time, float64

TINY = 1e-8
"""Probabilities of a kernel below this count as none, as in the published code."""
STEADY = 1e-6
"""Added to the probability that a ratio is divided by, as there."""
SPAN = 36.0
"""Of the logarithms of a stationary law, at most: beyond, products of its roots are wrong in double precision."""


@dataclass(frozen=True)
class TokenProcess(ABC):
    """What all chains have; ``states`` counts the mask too, where there is one."""

    states: int

    def __post_init__(self) -> None:
        if self.states < 2:
            raise BadInput(f"a token needs at least two states, got {self.states}")

    @property
    def mask(self) -> int | None:
        """The state that absorbs all others, if there is one."""
        return None

    @abstractmethod
    def marginal(self, t: Time, s: Time = 0.0) -> Float[Tensor, "... states states"]:
        """q(x_t = y | x_s = x) for s <= t, the exponential of the rates between; from clean tokens by default."""

    @abstractmethod
    def rate(self, t: Time) -> Float[Tensor, "... states states"]:
        """I'(t) Q: how often per unit of time x becomes y as noise is added; rows sum to 0."""

    @abstractmethod
    def stationary(self) -> Float[Tensor, "states"]:
        """The law of a token that is noise: where a sampler starts."""

    def prior(self, uniform: Float[Tensor, "batch *dims"]) -> Int[Tensor, "batch *dims"]:
        """Tokens that are noise, from ``uniform`` numbers in [0, 1)."""
        return pick(self.stationary().to(uniform).expand(*uniform.shape, -1), uniform)

    def diffuse(
        self, x: Int[Tensor, "batch *dims"], t: Time, uniform: Float[Tensor, "batch *dims"]
    ) -> Int[Tensor, "batch *dims"]:
        """Tokens at ``t``: where the distribution function of q_t(. | x) reaches ``uniform``, in [0, 1)."""
        return pick(_rows(self.marginal(t), x).to(uniform), uniform)

    def posterior(
        self, x: Int[Tensor, "batch *dims"], x0: Int[Tensor, "batch *dims"], t: Time, s: Time
    ) -> Float[Tensor, "batch *dims states"]:
        """q(x_s = y | x_t, x_0) for s <= t, by Bayes' rule.

        Raises:
            BadInput: a token that its x_0 cannot have become by t, such as another one without a mask between.
        """
        joint = _rows(self.marginal(s), x0) * _rows(self.marginal(t, s).mT, x)
        total = joint.sum(-1, keepdim=True)
        if not (total > 0).all():
            raise BadInput("some token of x cannot have come from its token of x0 by that time: give pairs that can")
        return joint / total

    def convert(
        self,
        pred: Float[Tensor, "batch *dims states"],
        x: Int[Tensor, "batch *dims"],
        t: Time,
        source: DiscretePrediction,
        target: DiscretePrediction,
    ) -> Float[Tensor, "batch *dims states"]:
        """A prediction of kind ``source`` as one of kind ``target``.

        score_y = sum_x0 p(x0 | x) q_t[x0, y] / (q_t[x0, x] + 1e-6), rates_y = I'(t) Q[y, x] score_y for y != x.

        Raises:
            BadInput: rates that leave the scores open, where Q has zeros; an unknown kind.
        """
        for kind in (source, target):
            if kind not in ("posterior", "score", "rates"):
                raise BadInput(f"unknown prediction of tokens {kind!r}: use posterior, score or rates")
        if source == target:
            return pred
        own = one_hot(x, self.states).bool()
        q, back = self.marginal(t), _rows(self.rate(t).mT, x).to(pred)
        if source == "posterior":
            pred = _times(pred / (_rows(q.mT, x).to(pred) + STEADY), q)
        elif source == "rates":
            if bool(((back == 0) & ~own).any()):
                raise BadInput("these rates do not say how likely every state is: give posteriors or scores")
            pred = pred / back.masked_fill(own, 1.0)
        score = pred.masked_fill(own, 1.0)
        if target == "score":
            return score
        if target == "rates":
            return (score * back).masked_fill(own, 0.0)
        law = _times(score, torch.linalg.inv(q)) * _rows(q.mT, x).to(score)
        law = law.clamp(min=0)
        return law / law.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Absorbing(TokenProcess):
    """A token is masked by time t with probability m(t) = (1 - eps) t, and stays so; the mask is the last state.

    Log-linear noise: the rate is sigma(t) = (1 - eps) / (1 - (1 - eps) t). Backwards the mask becomes y at the rate
    p(y | x) / t.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eps < 1:
            raise BadInput(f"eps, the share that is never masked, is at least 0 and less than 1, not {self.eps}")

    @property
    def mask(self) -> int:
        return self.states - 1

    def masked(self, t: Time) -> Float[Tensor, "..."]:
        """m(t)."""
        return (1 - self.eps) * float64(t)

    def diffuse(
        self, x: Int[Tensor, "batch *dims"], t: Time, uniform: Float[Tensor, "batch *dims"]
    ) -> Int[Tensor, "batch *dims"]:
        """Masked where ``uniform`` < m(t): what is masked at a time is masked at all later ones."""
        return torch.where(uniform < _right(self.masked(t), x).to(uniform), self.mask, x)

    def marginal(self, t: Time, s: Time = 0.0) -> Float[Tensor, "... states states"]:
        left, before = 1 - self.masked(t), 1 - self.masked(s)
        kept = (left / before)[..., None, None]
        eye = torch.eye(self.states, dtype=torch.float64, device=kept.device)
        return kept * eye + (1 - kept) * eye[self.mask]

    def rate(self, t: Time) -> Float[Tensor, "... states states"]:
        sigma = ((1 - self.eps) / (1 - self.masked(t)))[..., None, None]
        eye = torch.eye(self.states, dtype=torch.float64, device=sigma.device)
        return sigma * (eye[self.mask] - eye)

    def stationary(self) -> Float[Tensor, "states"]:
        return torch.eye(self.states, dtype=torch.float64)[self.mask]

    def convert(
        self,
        pred: Float[Tensor, "batch *dims states"],
        x: Int[Tensor, "batch *dims"],
        t: Time,
        source: DiscretePrediction,
        target: DiscretePrediction,
    ) -> Float[Tensor, "batch *dims states"]:
        """See `TokenProcess.convert`; a token that is not masked is certain. Nothing is divided by nearly nothing.

        score_y = (1 - m) / m p(y | x), rates_y = p(y | x) / t.
        """
        if source == target:
            return pred
        time = _right(float64(t), x)[..., None].to(pred)
        m = (1 - self.eps) * time
        unit = {"posterior": torch.ones_like(m), "score": (1 - m) / m, "rates": 1 / time}
        own = one_hot(x, self.states).to(pred)
        hidden = (x == self.mask)[..., None]
        law = torch.where(hidden, pred / unit[source] * (1 - own), own)
        if target == "posterior":
            return law
        made = torch.where(hidden, law * unit[target], 0.0)
        return made + own if target == "score" else made


@dataclass(frozen=True)
class UniformTokens(TokenProcess):
    """A token becomes any other at the rate ``c``: Q = c (1 1^T - S Id), I(t) = t; all values are noise alike.

    ``c`` None is 8 / S, at which 3 in 10,000 tokens are still as they were at t = 1. Published for piano rolls with
    S = 129: 0.03.
    """

    c: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c is not None and self.c <= 0:
            raise BadInput(f"the rate c must be positive, got {self.c}")

    @property
    def _total(self) -> float:
        return 8.0 if self.c is None else self.c * self.states

    def marginal(self, t: Time, s: Time = 0.0) -> Float[Tensor, "... states states"]:
        kept = torch.exp(-self._total * (float64(t) - float64(s)))[..., None, None]
        eye = torch.eye(self.states, dtype=torch.float64, device=kept.device)
        return kept * eye + (1 - kept) / self.states

    def rate(self, t: Time) -> Float[Tensor, "... states states"]:
        like = float64(t)[..., None, None]
        eye = torch.eye(self.states, dtype=torch.float64, device=like.device)
        return torch.zeros_like(like) + self._total * (1 / self.states - eye)

    def stationary(self) -> Float[Tensor, "states"]:
        return torch.full((self.states,), 1 / self.states, dtype=torch.float64)


@dataclass(frozen=True)
class GaussianTokens(TokenProcess):
    """Ordered values move to nearby ones, outwards less than inwards, so that noise is bell-shaped (`base_rate`).

    I(t) = ``time_base`` (``time_exponential``^t - 1); the defaults are tau-LDR's for CIFAR-10 with 256 states.
    """

    rate_sigma: float = 6.0
    noise_sigma: float = 512.0
    time_base: float = 3.0
    time_exponential: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rate_sigma, self.noise_sigma, self.time_base) <= 0 or self.time_exponential <= 1:
            raise BadInput("the widths and time_base must be positive, and time_exponential more than 1")
        if self.noise_sigma < (least := self.states / 2 / math.sqrt(2 * SPAN)):
            raise BadInput(
                f"noise_sigma={self.noise_sigma:g} leaves the outermost of {self.states} values no probability that "
                f"could be computed with: give at least {least:.3g}"
            )

    def integral(self, t: Time) -> Float[Tensor, "..."]:
        """I(t)."""
        return self.time_base * torch.expm1(math.log(self.time_exponential) * float64(t))

    def marginal(self, t: Time, s: Time = 0.0) -> Float[Tensor, "... states states"]:
        values, vectors, root = (x.to(float64(t).device) for x in _spectrum(self))
        grown = torch.exp(values * (self.integral(t) - self.integral(s))[..., None])
        q = (vectors * grown[..., None, :]) @ vectors.mT / root[:, None] * root
        return torch.where(q < TINY, 0.0, q)

    def rate(self, t: Time) -> Float[Tensor, "... states states"]:
        slope = math.log(self.time_exponential) * (self.integral(t) + self.time_base)
        return slope[..., None, None] * base_rate(self.states, self.rate_sigma, self.noise_sigma).to(slope.device)

    def stationary(self) -> Float[Tensor, "states"]:
        return gaussian_law(self.states, self.noise_sigma)


def gaussian_law(states: int, noise_sigma: float) -> Float[Tensor, "states"]:
    """pi_i proportional to exp(-(i + 1 - S / 2)^2 / (2 noise_sigma^2)), i from 0."""
    i = torch.arange(states, dtype=torch.float64)
    return torch.softmax(-((i + 1 - states / 2) ** 2) / (2 * noise_sigma**2), dim=0)


@lru_cache(maxsize=8)
def base_rate(states: int, rate_sigma: float, noise_sigma: float) -> Float[Tensor, "states states"]:
    """Q of `GaussianTokens`: exp(-(|i - j| - 1)^2 / rate_sigma^2) towards the middle, else by detailed balance.

    Towards the middle is i < S // 2 and i < j < S - i, or i > S // 2 and S - 1 - i < j < i.
    """
    i, j = torch.meshgrid(*[torch.arange(states)] * 2, indexing="ij")
    inwards = ((i < states // 2) & (i < j) & (j < states - i)) | ((i > states // 2) & (states - 1 - i < j) & (j < i))
    q = torch.where(inwards, torch.exp(-(((i - j).abs() - 1).double() ** 2) / rate_sigma**2), 0.0)
    law = gaussian_law(states, noise_sigma)
    q = torch.where(q.mT > 0, q.mT * law / law[:, None], q)
    return q - torch.diag(q.sum(1))


@lru_cache(maxsize=8)
def _spectrum(process: GaussianTokens) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the symmetric pi^(1/2) Q pi^(-1/2), and the root of pi."""
    root = process.stationary().sqrt()
    q = base_rate(process.states, process.rate_sigma, process.noise_sigma) * root[:, None] / root
    values, vectors = torch.linalg.eigh((q + q.mT) / 2)
    return values.clamp(max=0), vectors, root


def pick(law: Float[Tensor, "*dims states"], uniform: Float[Tensor, "*dims"]) -> Int[Tensor, "*dims"]:
    """The state at which the distribution function of ``law`` (of any sum) reaches ``uniform``, in [0, 1)."""
    edges = law.clamp(min=0).cumsum(-1)
    found = torch.searchsorted(edges, (uniform * edges[..., -1])[..., None].contiguous(), right=True)[..., 0]
    last = law.shape[-1] - 1 - (law > 0).flip(-1).int().argmax(-1)  # rounding must not reach an impossible state
    return torch.minimum(found, last)


def _right(t: Tensor, x: Tensor) -> Tensor:
    """Times with ones appended until they line up with the first dimensions of the tokens."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)).to(x.device) if t.ndim else t.to(x.device)


def _rows(matrix: Tensor, x: Tensor) -> Tensor:
    """Rows ``x`` of one matrix, or of one for each row of the batch."""
    matrix = matrix.to(x.device)
    if matrix.ndim == 2:
        return matrix[x]
    if matrix.ndim != 3 or len(matrix) not in (1, len(x)):
        raise BadInput("tokens take one time for all, or one for each row of the batch")
    matrix = matrix.expand(len(x), -1, -1)
    return matrix[torch.arange(len(x), device=x.device).view(-1, *[1] * (x.ndim - 1)), x]


def _times(pred: Tensor, matrix: Tensor) -> Tensor:
    """Row vectors, one for each token, times one matrix or one for each row of the batch."""
    matrix = matrix.to(pred)
    if matrix.ndim == 2:
        return pred @ matrix
    return (pred.flatten(1, -2) @ matrix).view_as(pred)
