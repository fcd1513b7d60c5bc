"""The network of a text-to-image pipeline as a `Denoiser`: continuous time in, native prediction out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.noise import DiscreteSchedule, GaussianProcess
from sfumato.noise.process import Prediction

from .conditioning import Conditioning

if TYPE_CHECKING:
    from .base import Text2Image

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def native_prediction(scheduler) -> Prediction:
    """What the network predicts, by its scheduler's configuration.

    Raises:
        BadInput: a prediction type that is none of epsilon, v_prediction, sample.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise BadInput(
            f"unsupported prediction type {kind!r}: this pipeline must predict one of {list(_PREDICTIONS)}"
        )
    return _PREDICTIONS[kind]


def timestep_of(t: Float[Tensor, "..."] | float, T: int) -> Float[Tensor, "..."]:
    """The network's timestep for time t in [0, 1]: t T - 1, since timestep i stands at t = (i + 1) / T.

    Computed in float64 and snapped to an integer when within 1e-3 of one, so that float32 times (whose
    rounding error times T = 1000 stays below 1e-4) give exactly the embedding that training used. Times below
    1 / T give 0, the least noise that the network has seen.
    """
    x = torch.as_tensor(t, dtype=torch.float64) * T - 1.0
    nearest = x.round()
    return torch.where((x - nearest).abs() <= 1e-3, nearest, x).clamp_min(0.0).to(torch.float32)


class NetworkDenoiser:
    """`Text2Image`'s network as a `Denoiser`.

    Reads the network from its pipeline at every call, so adapters, attention edits and trained weights take
    effect.
    """

    def __init__(self, owner: Text2Image):
        scheduler = owner.pipe.scheduler
        self._owner = owner
        self.prediction = native_prediction(scheduler)
        self.process = GaussianProcess(DiscreteSchedule.from_alphas_cumprod(alphas_cumprod(scheduler)))
        self.timesteps = int(scheduler.config.num_train_timesteps)

    def __call__(
        self,
        z: Float[Tensor, "batch channel height width"],
        t: Float[Tensor, "..."] | float,
        cond: Conditioning,
    ) -> Float[Tensor, "batch channel height width"]:
        """The network's own prediction, in the dtype of ``z``.

        Args:
            z: noisy latent, variance-preserving (alpha x + sigma eps).
            t: time in [0, 1], 1 = noise; one for all, or one per picture in any shape with that many
                elements.
            cond: as many rows as ``z``, or one row for all.
        """
        n = z.shape[0]
        step = timestep_of(t, self.timesteps).reshape(-1).to(z.device)
        if step.numel() not in (1, n):
            raise ValueError(
                f"{step.numel()} times for {n} pictures: this network takes one time per picture"
            )
        if len(cond) not in (1, n):
            raise ValueError(f"{len(cond)} conditionings for {n} pictures: give one for all or one for each")
        if len(cond) < n:
            cond = cond.map(lambda x: x.expand(n, *x.shape[1:]))
        return self._owner.anatomy.call(z, step.expand(n), cond)

    def predict(
        self,
        z: Float[Tensor, "batch channel height width"],
        t: Float[Tensor, "..."] | float,
        cond: Conditioning,
        kind: Prediction = "eps",
    ) -> Float[Tensor, "batch channel height width"]:
        """The prediction converted to ``kind``: "eps", "v", "x0" or "score"."""
        native = self(z, t, cond)
        return (
            native if kind == self.prediction else self.process.convert(native, z, t, self.prediction, kind)
        )


def alphas_cumprod(scheduler) -> Float[Tensor, "timesteps"]:
    """The squared signal levels that the checkpoint was trained under, in float64."""
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise BadInput(
            f"{type(scheduler).__name__} has no noise schedule with alphas: use a DDPM-style scheduler"
        )
    return scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
