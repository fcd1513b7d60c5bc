"""The network of a model as a `Denoiser`: continuous time in, native prediction out."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.noise import GaussianProcess
from sfumato.noise.process import Prediction

from .contract import Model


class NetworkDenoiser:
    """A model's network as a `Denoiser`.

    Reads the network from its model at every call, so adapters, attention edits and trained weights take effect.
    """

    def __init__(self, owner: Model):
        self._owner = owner

    @property
    def process(self) -> GaussianProcess:
        return self._owner.process

    @property
    def prediction(self) -> Prediction:
        return self._owner.prediction

    def __call__(
        self, z: Float[Tensor, "batch *dims"], t: Float[Tensor, "..."] | float, cond: Any = None
    ) -> Float[Tensor, "batch *dims"]:
        """The network's own prediction, in the dtype of ``z``.

        Args:
            z: what is to be denoised, alpha x + sigma eps under `process`.
            t: time in [0, 1], 1 = noise; one for all, or one per picture in any shape with that many elements; for
                frames [batch or 1, frame].
            cond: a `Condition` with as many rows as ``z``, or one row for all; None is nothing, where a model can be
                told nothing.
        """
        if cond is not None and len(cond) not in (1, len(z)):
            raise ValueError(f"{len(cond)} conditions for {len(z)} pictures: give one for all or one for each")
        return self._owner.call(z, t, cond)

    def predict(
        self,
        z: Float[Tensor, "batch *dims"],
        t: Float[Tensor, "..."] | float,
        cond: Any = None,
        kind: Prediction = "eps",
    ) -> Float[Tensor, "batch *dims"]:
        """The prediction converted to ``kind``: "eps", "v", "x0", "score" or "flow"."""
        return self.process.convert(self(z, t, cond), z, t, self.prediction, kind)
