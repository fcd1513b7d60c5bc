"""What is kept on the average over concepts, with an interval over pictures: each may count for several concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from sfumato.metrics.bootstrap import influence_interval, wilson
from sfumato.report.schema import Interval


@dataclass(frozen=True)
class Kept:
    """Which pictures count for which retained concepts, and in which they are still there.

    Attributes:
        concepts: the columns.
        counted: pictures that were asked to show the concept, and in whose original the detector finds it.
        there: those of them in whose counterpart by the edited model it does, too.
        seed: of the intervals' bootstrap.
    """

    concepts: Sequence[str]
    counted: Bool[Tensor, "pictures concepts"]
    there: Bool[Tensor, "pictures concepts"]
    seed: int

    def mean(self, *sides: Sequence[str]) -> Interval | None:
        """The mean over ``sides`` of the mean rate of each one's concepts; None where nothing of them was measured.

        A picture that breaks takes all concepts with it that it counts for, so whole pictures are resampled: with h_iw
        whether w is there in picture i, n_w the number that count for w, r_w their share and a_w the weight of r_w in
        the mean, the influence of one of N pictures is N sum_w a_w (h_iw - r_w) / n_w. The interval is Wilson's where
        the mean is exactly 0 or 1, over the pictures. Where no picture moves the mean, but it is neither (one concept
        wholly kept, another wholly lost), its bounds are the means of the concepts' own.
        """
        n = self.counted.sum(0)
        columns = [[k for w in side if n[k := self.concepts.index(w)] > 0] for side in sides]
        if not (columns := [some for some in columns if some]):
            return None
        weights = torch.zeros(len(self.concepts), dtype=torch.float64)
        for some in columns:
            weights[some] += 1 / (len(columns) * len(some))
        used = weights > 0
        counted, there, n, weights = self.counted[:, used], self.there[:, used], n[used], weights[used]
        rows = counted.any(1)
        counted, there, pictures = counted[rows].double(), there[rows].double(), int(rows.sum())
        rates = there.sum(0) / n
        value = float(weights @ rates)
        if bool((rates == rates[0]).all()) and float(rates[0]) in (0.0, 1.0):
            share = int(rates[0])
            return Interval(float(share), *wilson(share * pictures, pictures), pictures)
        influence = pictures * ((there - rates * counted) / n) @ weights
        if float(influence.abs().max()) < 1e-9:
            bounds = [wilson(int(k), int(m)) for k, m in zip(there.sum(0), n, strict=True)]
            low, high = (weights @ torch.tensor(bounds, dtype=torch.float64)).tolist()
            return Interval(value, low, high, pictures)
        found = influence_interval(value, influence, torch.Generator().manual_seed(self.seed))
        return Interval(value, max(0.0, found.low), min(1.0, found.high), pictures)
