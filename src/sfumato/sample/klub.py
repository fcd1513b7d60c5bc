"""How much a step more is worth: the upper bound KLUB of Jump Your Steps (arXiv:2410.07761) and its estimators.

P is the law of paths whose rates stand still from t1 to t2 and are then those of (x_t2, t2) until t3; Q keeps those of
(x_t1, t1) throughout. By Girsanov's theorem for jumps KL(P || Q) = (t2 - t3) E sum_d sum_y [R2 log(R2 / R1) - R2 + R1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import BadInput
from ..noise.denoiser import DiscreteDenoiser
from ..noise.discrete import pick
from .tokens import CLEANEST, euler_law, poisson, rates

Terms = Literal["full", "official"]
Estimator = Literal["data", "path"]
Kind = Literal["euler", "tau_leaping", "k_gillespie"]
FLOOR = 1e-8
"""Added to both rates inside the logarithm, as in the published code."""


def klub(
    before: Float[Tensor, "batch *dims states"],
    after: Float[Tensor, "batch *dims states"],
    weight: Float[Tensor, "batch"] | float,
    terms: Terms = "full",
) -> Float[Tensor, "batch"]:
    """The bound of each row, of the rates R1 = ``before`` and R2 = ``after``; ``weight`` is t2 - t3.

    "full": weight times the sum over tokens and states of R2 log(R2 / R1) - R2 + R1, the bound itself, never negative
    but for the floor in the logarithms. "official": the first term alone, summed over states and averaged over tokens,
    as the published code has it; for masks the two agree in expectation, but for the factor of the tokens' number.
    """
    each = after * ((after + FLOOR).log() - (before + FLOOR).log())
    if terms == "full":
        return weight * (each - after + before).flatten(1).sum(1)
    return weight * each.sum(-1).flatten(1).mean(1)


def masked_at(
    x0: Int[Tensor, "batch *dims"], uniform: Float[Tensor, "batch *dims"], decoded: int, mask: int, eps: float = 1e-3
) -> tuple[Int[Tensor, "batch *dims"], Float[Tensor, "batch"]]:
    """``x0`` with all but ``decoded`` tokens masked, those with the smallest ``uniform`` numbers, and each row's time.

    The time is the largest of these numbers over 1 - eps, at most 1; 1e-5 where nothing is masked.
    """
    flat = uniform.flatten(1)
    hidden = flat.shape[1] - decoded
    if hidden <= 0:
        return x0, torch.full((len(x0),), CLEANEST, dtype=torch.float64, device=x0.device)
    values, places = flat.topk(hidden, dim=1, largest=False)
    x = x0.flatten(1).scatter(1, places, mask).view_as(x0)
    return x, (values[:, -1].double() / (1 - eps)).clamp(0, 1)


@dataclass
class Gain:
    """KLUB(t1, t2, t3) of a model as a function of its arguments, with the same random numbers at every call.

    For "k_gillespie" the arguments are numbers of decoded tokens, which are rounded, and each row has times of its own.

    Attributes:
        denoiser, cond: the model, and what it is told.
        data: clean sequences, of the data or of the model.
        kind: the sampler.
        terms: see `klub`.
        estimator: "data": x_t1 and x_t2 by the forward process with the same uniform numbers; "path": x_t2 by one step
            of the sampler from x_t1.
        batch: sequences computed together.
    """

    denoiser: DiscreteDenoiser
    data: Int[Tensor, "n *dims"]
    kind: Kind = "euler"
    terms: Terms = "full"
    estimator: Estimator = "data"
    seed: int = 42
    batch: int = 64
    cond: Any = None
    calls: int = field(default=0, init=False)
    """Network calls so far, in batches."""
    _kept: tuple[float, list[Tensor]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.kind == "k_gillespie" and getattr(self.denoiser.process, "mask", None) is None:
            raise BadInput("k-Gillespie needs a chain with a mask: choose its steps for euler")
        if self.kind == "tau_leaping" and getattr(self.denoiser.process, "mask", None) is not None:
            raise BadInput("tau-leaping adds jumps up, which a mask does not allow: choose the steps for euler")
        if not len(self.data):
            raise BadInput("the steps are chosen by samples: give some")

    @cached_property
    def _uniform(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.data.shape, generator=generator, dtype=torch.float64).to(self.data.device)

    @torch.no_grad()
    def __call__(self, t1: float, t2: float, t3: float) -> float:
        """The mean over the samples. Cost: a network call for each batch, and one more where t1 is new."""
        if self.kind == "k_gillespie":
            t1, t2, t3 = round(t1), round(t2), round(t3)
        parts = [slice(i, i + self.batch) for i in range(0, len(self.data), self.batch)]
        if self._kept is None or self._kept[0] != t1:
            self._kept = t1, [self._rates(*self._noised(t1, rows), rows) for rows in parts]
        total = 0.0
        for rows, before in zip(parts, self._kept[1], strict=True):
            x2, time2 = self._second(t1, t2, rows, before)
            _, time3 = self._noised(t3, rows)
            after = self._rates(x2, time2, rows)
            total += float(klub(before, after, (time2 - time3).to(after), self.terms).double().sum())
        return total / len(self.data)

    def _noised(self, t: float, rows: slice) -> tuple[Tensor, Tensor]:
        x0, uniform, process = self.data[rows], self._uniform[rows], self.denoiser.process
        if self.kind == "k_gillespie":
            chain: Any = process
            return masked_at(x0, uniform, int(t), chain.mask, getattr(chain, "eps", 0.0))
        return process.diffuse(x0, t, uniform), torch.full((len(x0),), t, dtype=torch.float64)

    def _second(self, t1: float, t2: float, rows: slice, before: Tensor) -> tuple[Tensor, Tensor]:
        x2, time2 = self._noised(t2, rows)
        if self.estimator == "data":
            return x2, time2
        x1, _ = self._noised(t1, rows)
        generator = torch.Generator().manual_seed(self.seed + 1)
        drawn = torch.rand(self.data.shape, generator=generator, dtype=torch.float64)[rows].to(before)
        if self.kind == "tau_leaping":
            # The batches have streams of their own, or all would jump alike.
            jumps = poisson(before * (t1 - t2), torch.Generator().manual_seed(self.seed + 1 + rows.start))
            away = torch.arange(before.shape[-1], device=x1.device) - x1[..., None]
            return (x1 + (jumps * away).sum(-1).long()).clamp(0, before.shape[-1] - 1), time2
        if self.kind == "euler":
            return pick(euler_law(before, x1, t1 - t2), drawn), time2
        # The tokens that the forward process would have unmasked, each in a jump of its own.
        return torch.where(x1 != x2, pick(before, drawn), x1), time2

    def _rates(self, x: Tensor, t: Tensor, rows: slice) -> Tensor:
        self.calls += 1
        cond = None if self.cond is None else self.cond if len(self.cond) == 1 else self.cond[rows]
        shared = t[0] if bool((t == t[0]).all()) else t
        return rates(self.denoiser, x, shared, cond)
