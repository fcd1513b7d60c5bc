"""Any diffusers scheduler as a sampler with this package's signature."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from ..noise.denoiser import Denoiser
from ..noise.process import GaussianProcess, Prediction
from .samplers import Callback, Generators, Times, predict

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


def tells_log_sigma(scheduler: Any) -> bool:
    """Whether a scheduler's timesteps are 0.25 log sigma, and not those of a table."""
    config = scheduler.config
    return config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"


class SchedulerSampler:
    """Drives a diffusers scheduler (an instance, left unchanged) with a `Denoiser`; call it like any sampler.

    ``times`` is the number of steps, spaced as the scheduler is configured to, or a grid of which each time
    but the last must be a timestep (i + 1) / T (the scheduler decides where it ends). ``z`` is in the
    denoiser's scale, also for schedulers that keep another one inside. ``options`` go to ``scheduler.step``
    (such as eta).

    The denoiser's process must be the one the scheduler describes: for tables of betas
    ``DiscreteSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)``, for flow matching `RectifiedFlow`.
    """

    def __init__(self, scheduler: Any, **options: Any) -> None:
        config = scheduler.config
        self.flow = "prediction_type" not in config or config["prediction_type"] == "flow_prediction"
        if not self.flow and (not hasattr(scheduler, "alphas_cumprod") or tells_log_sigma(scheduler)):
            name = type(scheduler).__name__
            raise BadInput(
                f"{name} works with neither a table of betas nor flow matching: use heun or dpmpp_2m"
            )
        self.scheduler, self.options = scheduler, options
        self.prediction = "flow" if self.flow else PREDICTIONS[config["prediction_type"]]

    def __call__(
        self,
        denoiser: Denoiser,
        z: Float[Tensor, "batch *dims"],
        times: int | Times,
        cond: Any = None,
        generator: Generators | None = None,
        callback: Callback | None = None,
    ) -> Float[Tensor, "batch *dims"]:
        """The sample at the end of the scheduler's own grid."""
        scheduler = deepcopy(self.scheduler)
        self._set_times(scheduler, times, z.device)
        options = dict(self.options)
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = generator
        for step, timestep in enumerate(scheduler.timesteps):
            if step == 0 and hasattr(scheduler, "scale_model_input"):
                # Schedulers that keep z / alpha inside say so only through this method.
                z = z / scheduler.scale_model_input(torch.ones((), dtype=z.dtype, device=z.device), timestep)
            scaled = (
                scheduler.scale_model_input(z, timestep) if hasattr(scheduler, "scale_model_input") else z
            )
            t = self._time(denoiser.process, timestep)
            pred = predict(denoiser, scaled, t, cond, self.prediction)
            z = scheduler.step(pred, timestep, z, return_dict=False, **options)[0]
            if callback is not None:
                callback(step, t, z)
        return z

    def _time(self, process: GaussianProcess, timestep: Tensor) -> Tensor:
        level = timestep.double() / self.scheduler.config.num_train_timesteps
        if self.flow:  # the timestep is sigma, whatever shift the process counts its time with
            return process.schedule.time(2 * (torch.log1p(-level) - torch.log(level)))
        return level + 1 / self.scheduler.config.num_train_timesteps

    def _set_times(self, scheduler: Any, times: int | Times, device: torch.device) -> None:
        if isinstance(times, int):
            scheduler.set_timesteps(times, device=device)
            return
        name, total = type(scheduler).__name__, scheduler.config.num_train_timesteps
        exact = times[:-1] * total - (0 if self.flow else 1)
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        if self.flow and "sigmas" in accepted:
            scheduler.set_timesteps(sigmas=(exact / total).tolist(), device=device)
        elif not self.flow and "timesteps" in accepted:
            if (exact - exact.round()).abs().max() > 1e-3 or exact.min() < -1e-3:
                raise BadInput(
                    f"{name} visits only times (i + 1) / {total}: round the grid, or give a number of steps"
                )
            scheduler.set_timesteps(timesteps=[round(x) for x in exact.tolist()], device=device)
        else:
            raise BadInput(f"{name} takes no grid of its own: give a number of steps")


def from_scheduler(scheduler: Any, **options: Any) -> SchedulerSampler:
    """A sampler that takes the steps of a diffusers scheduler; see `SchedulerSampler`."""
    return SchedulerSampler(scheduler, **options)
