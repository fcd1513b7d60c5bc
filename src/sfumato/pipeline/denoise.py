"""The network of a text-to-image pipeline as a `Denoiser`: continuous time in, native prediction out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from sfumato.noise import GaussianProcess
from sfumato.noise.process import Prediction

from .conditioning import Conditioning

if TYPE_CHECKING:
    from .base import Text2Image


class NetworkDenoiser:
    """`Text2Image`'s network as a `Denoiser`.

    Reads the network from its pipeline at every call, so adapters, attention edits and trained weights take
    effect.
    """

    def __init__(self, owner: Text2Image):
        self._owner = owner

    @property
    def process(self) -> GaussianProcess:
        return self._owner.clock.process

    @property
    def prediction(self) -> Prediction:
        return self._owner.clock.prediction

    @property
    def timesteps(self) -> int:
        return self._owner.clock.timesteps

    def __call__(
        self,
        z: Float[Tensor, "batch channel height width"],
        t: Float[Tensor, "..."] | float,
        cond: Conditioning,
    ) -> Float[Tensor, "batch channel height width"]:
        """The network's own prediction, in the dtype of ``z``.

        Args:
            z: noisy latent, alpha x + sigma eps under `process`.
            t: time in [0, 1], 1 = noise; one for all, or one per picture in any shape with that many
                elements.
            cond: as many rows as ``z``, or one row for all.
        """
        n, clock = z.shape[0], self._owner.clock
        step = clock.number(t).reshape(-1).to(z.device)
        if step.numel() not in (1, n):
            raise ValueError(
                f"{step.numel()} times for {n} pictures: this network takes one time per picture"
            )
        if len(cond) not in (1, n):
            raise ValueError(f"{len(cond)} conditionings for {n} pictures: give one for all or one for each")
        if len(cond) < n:
            cond = cond.map(lambda x: x.expand(n, *x.shape[1:]))
        return clock.native(self._owner.anatomy.call(z, step.expand(n), cond))

    def predict(
        self,
        z: Float[Tensor, "batch channel height width"],
        t: Float[Tensor, "..."] | float,
        cond: Conditioning,
        kind: Prediction = "eps",
    ) -> Float[Tensor, "batch channel height width"]:
        """The prediction converted to ``kind``: "eps", "v", "x0", "score" or "flow"."""
        native = self(z, t, cond)
        return (
            native if kind == self.prediction else self.process.convert(native, z, t, self.prediction, kind)
        )
