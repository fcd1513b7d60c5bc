"""The seam that samplers, losses and distillation stand on: anything that undoes noise."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from .process import GaussianProcess, Prediction


@runtime_checkable
class Denoiser(Protocol):
    """Maps (noisy input, time, conditioning) to a prediction, under the process it was trained for.

    ``process`` is the noise process; ``prediction`` names what ``__call__`` returns ("eps", "v", "x0", ...),
    which ``process.convert`` turns into any other. Time is continuous in [0, 1], 1 = noise, and may be one
    number, one per picture, or any shape that broadcasts against ``z`` (per frame, per element; the rule is
    in `sfumato.noise.process`).
    """

    process: GaussianProcess
    prediction: Prediction

    def __call__(
        self, z: Float[Tensor, "batch *dims"], t: Float[Tensor, "..."] | float, cond: Any = None
    ) -> Tensor:
        """The prediction for ``z`` at time ``t``, of the shape of ``z``."""
        ...
