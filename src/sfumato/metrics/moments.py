"""Mean and covariance of features in float64: of one matrix, of a stream of batches, of several processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .gather import largest_of_processes, sum_over_processes

_ROWS = 4096  # rows turned to float64 at a time


@dataclass(frozen=True)
class Moments:
    """``n`` features summed up: mean (d,) and covariance (d, d) with divisor n - 1, both float64."""

    n: int
    mean: Float[Tensor, "d"]
    cov: Float[Tensor, "d d"]


class RunningMoments:
    """Moments of batches as they come, merged by the rule of Chan, Golub and LeVeque (1979).

    The textbook E[x x^T] - mean mean^T cancels where the mean is large against the spread; this does not. Memory:
    one (d, d) matrix, whatever the number of pictures.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Add a batch.

        Raises:
            BadInput: features that are no matrix, of another width than before, or not finite.
        """
        check_features(features, None if self.mean is None else len(self.mean))
        for rows in features.detach().split(_ROWS):
            x = rows.to(torch.float64)
            mean = x.mean(0)
            self._add(len(x), mean, scatter(x - mean))

    def merge(self, other: RunningMoments) -> None:
        """Add what another one has seen."""
        if other.n:
            self._add(other.n, other.mean, other.scatter)

    def reduced(self) -> RunningMoments:
        """The moments over all processes of `torch.distributed`, the same in each; a copy where there is one.

        A process may have seen nothing.
        """
        d = largest_of_processes(0 if self.mean is None else len(self.mean))
        # a process without pictures takes part, or the others would wait for it
        own = self.mean if self.mean is not None else torch.zeros(d, dtype=torch.float64)
        spread = self.scatter if self.scatter is not None else torch.zeros(d, d, dtype=torch.float64)
        n = int(sum_over_processes(torch.tensor(float(self.n), dtype=torch.float64)))
        mean = sum_over_processes(own * self.n) / max(n, 1)
        delta = own - mean
        total = RunningMoments()
        total.n, total.mean = n, mean
        total.scatter = sum_over_processes(spread + self.n * delta[:, None] * delta)
        return total

    def moments(self) -> Moments:
        """What was seen so far.

        Raises:
            BadInput: fewer than two pictures, which have no covariance.
        """
        if self.n < 2 or self.mean is None or self.scatter is None:
            raise BadInput(f"a covariance needs at least 2 pictures, not {self.n}")
        return Moments(self.n, self.mean, self.scatter / (self.n - 1))

    def _add(self, n: int, mean: Tensor, scattered: Tensor) -> None:
        if self.mean is None or self.scatter is None:
            self.n, self.mean, self.scatter = n, mean, scattered
            return
        total, delta = self.n + n, mean - self.mean
        self.scatter = self.scatter + scattered + (self.n * n / total) * delta[:, None] * delta
        self.mean = self.mean + delta * (n / total)
        self.n = total


def moments(features: Float[Tensor, "n d"]) -> Moments:
    """Mean and covariance of a matrix of features, one row a picture."""
    running = RunningMoments()
    running.update(features)
    return running.moments()


def scatter(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """x^T x. On the CPU by numpy, which computes one triangle only (BLAS syrk), as torch does not."""
    if x.device.type != "cpu":
        return x.mT @ x
    rows = x.numpy()
    return torch.from_numpy(rows.T @ rows)


def check_features(features: Tensor, width: int | None = None) -> None:
    """Raise `BadInput` unless ``features`` is a finite float matrix (of ``width`` columns)."""
    if features.ndim != 2 or not features.is_floating_point():
        raise BadInput(f"features are float (n, d), not {features.dtype} {tuple(features.shape)}")
    if width is not None and features.shape[1] != width:
        raise BadInput(f"features of {features.shape[1]} numbers do not go with features of {width}")
    finite = torch.isfinite(features).all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise BadInput(f"the features of picture {row} are not finite numbers: nothing can be measured with them")
