"""`S2N` as a diffusers scheduler: the same steps, driven by any diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from diffusers import DDIMScheduler, SchedulerMixin  # noqa: F401  (diffusers looks here for the base of what it loads)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import BadInput
from ..noise.process import GaussianProcess
from ..noise.schedule import DiscreteSchedule
from . import times
from .s2n_rule import Rule
from .samplers import extrapolated
from .scheduler import PREDICTIONS
from .schedulers import extends_ddim, noised

Grid = Literal["spacing", "logsnr", "karras"]


class S2NScheduler(DDIMScheduler):
    """The generalised backward equation (arXiv:2408.04221) on a table of betas; `S2N` explains rho to order.

    ``S2NScheduler.from_config(pipe.scheduler.config, rho=0.5)`` fits every pipeline that DDIM fits; the other
    settings are those of ``DDIMScheduler``, which rho = 0 is (rho = 1 is DDPM with its small variance). Between the
    trained timesteps the log-SNR is interpolated, so timesteps may be fractional.

    ``grid``: how timesteps are chosen: "spacing" as ``timestep_spacing`` says, "logsnr" evenly in log-SNR, "karras"
    as EDM does in kappa = sigma / alpha (the last two between the noisiest and the least noisy trained timestep).

    Differs from ``DDIMScheduler``: a step ends at the next timestep of the grid, also where the number of steps does
    not divide the table's length. Grids that end at the least noisy timestep go from there to the clean sample, also
    where ``set_alpha_to_one`` is false, as in Stable Diffusion: DDIM's last step, to that timestep, would be none.
    """

    @extends_ddim
    def __init__(
        self,
        rho: float = 0.5,
        freeze: float | None = None,
        gamma_w: float = 0.0,
        delta: float | None = None,
        order: Literal[1, 2] = 1,
        grid: Grid = "spacing",
    ):
        if grid not in ("spacing", "logsnr", "karras"):
            raise BadInput(f"unknown grid {grid!r}: use spacing, logsnr or karras")
        self.rule = Rule(rho=rho, freeze=freeze, gamma_w=gamma_w, delta=delta, order=order)
        self._before: tuple[int, Tensor] | None = None

    @cached_property
    def process(self) -> GaussianProcess:
        """The process of the table; timestep i is time (i + 1) / T."""
        return GaussianProcess(DiscreteSchedule.from_alphas_cumprod(self.alphas_cumprod))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the timesteps: a number of them, or the decreasing ``timesteps`` themselves, which may be fractions.

        Raises:
            BadInput: timesteps that do not decrease or lie outside the table.
        """
        self._before = None
        spaced = timesteps is None and self.config.grid == "spacing"
        self._end = 1 / self.config.num_train_timesteps if spaced and not self.config.set_alpha_to_one else 0.0
        if timesteps is not None:
            chosen = torch.as_tensor(timesteps)
            last = self.config.num_train_timesteps - 1
            if chosen.ndim != 1 or not len(chosen) or (chosen.diff() >= 0).any() or chosen[0] > last or chosen[-1] < 0:
                raise BadInput(f"timesteps must decrease within [0, {last}]")
            self.num_inference_steps, self.timesteps = len(chosen), chosen.to(device)
        elif spaced:
            super().set_timesteps(num_inference_steps, device)
        else:
            self.num_inference_steps, self.timesteps = num_inference_steps, self._grid(num_inference_steps).to(device)

    def _grid(self, steps: int) -> Tensor:
        schedule, first = self.process.schedule, 1 / self.config.num_train_timesteps
        if steps < 2:
            raise BadInput(f"grid={self.config.grid!r} needs at least two steps")
        # Zero SNR cannot be spaced evenly in log-SNR: such tables start at the first level that is finite.
        start = 1.0 if torch.isfinite(schedule.logsnr(1.0)) else 1.0 - first
        make = times.logsnr if self.config.grid == "logsnr" else times.karras
        return (make(schedule, steps - 1, start, first) * self.config.num_train_timesteps - 1).clamp(min=0).float()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As DDIM's, also at timesteps that are fractions."""
        return noised(self, original_samples, noise, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From ``sample`` at ``timestep`` to the next timestep of the grid; after the last to the clean sample.

        ``variance_noise`` takes the place of the noise that ``generator`` would draw.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        T = self.config.num_train_timesteps
        index = int((self.timesteps - float(timestep)).abs().argmin())
        last = index == len(self.timesteps) - 1
        t = (float(timestep) + 1) / T
        s = self._end if last else (float(self.timesteps[index + 1]) + 1) / T
        z = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x0 = self.process.convert(model_output.to(z), z, t, PREDICTIONS[self.config.prediction_type], "x0")
        if self.config.thresholding:
            x0 = self._threshold_sample(x0)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        ahead = x0
        if self.rule.order == 2 and not last and self._before is not None and self._before[0] == index - 1:
            before_t = (float(self.timesteps[index - 1]) + 1) / T
            ahead = extrapolated(self.process, x0, self._before[1], t, before_t, s)
        self._before = (index, x0)
        a, b, std = (c.to(z) for c in self.rule.coefficients(self.process, t, s))
        z = a * z + b * ahead
        if self.rule.noisy:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            z = z + std * variance_noise
        z, x0 = z.to(sample.dtype), x0.to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=z, pred_original_sample=x0) if return_dict else (z, x0)
