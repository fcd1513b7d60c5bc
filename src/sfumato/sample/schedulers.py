"""Schedulers for diffusers' own pipelines: ``pipe.scheduler = ADDIMScheduler.from_config(pipe.scheduler.config)``.

A pipeline saved with one of them names this module, so diffusers loads it again wherever this package is installed;
elsewhere pass another: ``from_pretrained(folder, scheduler=DDIMScheduler.from_pretrained(folder, subfolder=
"scheduler"))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from inspect import Signature, signature
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from ..noise.addim import lengthening
from ..noise.process import GaussianProcess
from ..noise.schedule import DiscreteSchedule, RectifiedFlow
from .scheduler import PREDICTIONS

UNASKED = 50
"""The number of steps with which diffusers' text-to-image pipelines call when nobody names one."""


def extends_ddim(init: Callable[..., None]) -> Callable[..., None]:
    """The ``__init__`` of a subclass of `DDIMScheduler` that names its own settings only, or another default of DDIM's.

    diffusers reads off a class's signature what it saves and what ``from_config`` takes over from another scheduler, so
    DDIM's settings stand in the signature too, before the class's own. ``init`` is run after DDIM's, with its own.
    """
    theirs = signature(DDIMScheduler.__init__).parameters
    own = dict(list(signature(init).parameters.items())[1:])
    added = [parameter for name, parameter in own.items() if name not in theirs]
    together = Signature([*(own.get(name, theirs[name]) for name in theirs), *added])

    @wraps(init)
    def whole(self: DDIMScheduler, *args: Any, **settings: Any) -> None:
        together.bind(self, *args, **settings)  # an unknown setting is a TypeError, as ever
        # what was given, and the defaults of what was not, are in the config by now
        DDIMScheduler.__init__(self, **{name: self.config[name] for name in theirs if name != "self"})
        init(self, **{name: self.config[name] for name in own})

    whole.__signature__ = together  # type: ignore[attr-defined]
    return register_to_config(whole)


def check_steps(asked: int, distilled: int | None) -> None:
    """Refuse a number of steps that is not the one (if any) for which a model was distilled.

    Raises:
        BadInput: says which number that is.
    """
    if distilled is not None and asked != distilled:
        raise BadInput(f"this model was distilled for {distilled} steps and cannot take {asked}: leave the number out")


def check_few(distilled: int | None, start: float) -> None:
    """Refuse what no distilled model draws with.

    Raises:
        BadInput: fewer than one step; a start outside (0, 1].
    """
    if distilled is not None and distilled < 1:
        raise BadInput(f"a distilled model takes at least one step, got {distilled}")
    if not 0 < start <= 1:
        raise BadInput(f"a distilled model starts at a time in (0, 1], got {start}")


def noised(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Clean samples as they are at timesteps (fractions, too), one for each, of a scheduler with a ``process``."""
    return scheduler.process.diffuse(clean, (timesteps.double() + 1) / scheduler.config.num_train_timesteps, noise)


class ADDIMScheduler(DDIMScheduler):
    """aDDIM (arXiv:2403.06807, algorithm 3): DDIM without its loss of variance, for any DDPM-style pipeline.

    All of `DDIMScheduler`'s settings (prediction types, betas, spacing, clipping of x0 but not of the noise) mean the
    same here. Deterministic; ``eta`` = 0 is DDIM bit for bit.

    Args:
        eta: share of the variance of x0 given z_t that is put back: 0.1 with the analytic rule, 0.75 with measured
            ``errors`` (the paper's settings). Not DDIM's ``eta``, which adds fresh noise; this one draws nothing.
        prior_variance: of x0 in each dimension, for the analytic rule Var[x0 | z_t] = 1 / (1 / prior_variance + SNR);
            the paper's 0.5 suits pixels, 1 suits latents of unit variance.
        errors: the network's mean squared error of x0 at each of the training timesteps, from
            `sfumato.sample.prediction_error`, which takes the place of the analytic rule.

    Raises:
        BadInput: a negative ``eta``, a ``prior_variance`` that is not positive, ``errors`` of another length.
    """

    @extends_ddim
    def __init__(self, eta: float = 0.1, prior_variance: float = 0.5, errors: Sequence[float] | None = None):
        if eta < 0 or prior_variance <= 0:
            raise BadInput(f"eta must not be negative, prior_variance be positive: got {eta} and {prior_variance}")
        if errors is not None and len(errors) != self.config.num_train_timesteps:
            raise BadInput(f"{len(errors)} errors for {self.config.num_train_timesteps} timesteps: give one for each")

    def variance(self, timestep: int | Tensor) -> float:
        """``eta`` times the variance of x0 given the noisy input at a timestep."""
        if self.config.errors is not None:
            return self.config.eta * self.config.errors[int(timestep)]
        alpha2 = float(self.alphas_cumprod[int(timestep)])
        return self.config.eta / (1 / self.config.prior_variance + alpha2 / (1 - alpha2))

    def step(
        self,
        model_output: Float[Tensor, "batch *dims"],
        timestep: int | Tensor,
        sample: Float[Tensor, "batch *dims"],
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From ``timestep`` to the one before it: `DDIMScheduler.step`, then the noise lengthened."""
        end, x0 = super().step(model_output, timestep, sample, return_dict=False)
        var = self.variance(timestep)
        if var > 0:
            eps = self._noise(model_output, timestep, sample)
            before = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
            alpha2, alpha2_s = self.alphas_cumprod[int(timestep)], self.final_alpha_cumprod
            alpha2_s = self.alphas_cumprod[before] if before >= 0 else alpha2_s
            alpha, sigma, alpha_s, sigma_s = (
                x.double().sqrt() for x in (alpha2, 1 - alpha2, alpha2_s, 1 - alpha2_s)
            )
            b = alpha_s - alpha * sigma_s / sigma
            wide = eps if eps.dtype == torch.float64 else eps.float()  # d numbers are summed
            end = end + (lengthening(wide, sigma_s.to(wide), (b.square() * var).to(wide)) * wide).to(end.dtype)
        return DDIMSchedulerOutput(prev_sample=end, pred_original_sample=x0) if return_dict else (end, x0)

    def _noise(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Tensor:
        """The predicted noise, as `DDIMScheduler.step` computes it."""
        alpha2 = self.alphas_cumprod[int(timestep)]
        alpha, sigma = alpha2**0.5, (1 - alpha2) ** 0.5
        if self.config.prediction_type == "epsilon":
            return model_output
        if self.config.prediction_type == "sample":
            return (sample - alpha * model_output) / sigma
        return alpha * model_output + sigma * sample


class FewStepScheduler(DDIMScheduler):
    """The scheduler of a distilled model: DDIM through t = 1, (S - 1) / S, ..., 1 / S to 0, whatever it is asked for.

    The times are exact also where S does not divide the training timesteps, where the network is asked between two of
    them, as in training. Each step ends at the next one's start, the last at t = 0. Deterministic unless ``ancestral``.

    Args:
        distilled_steps: S. Other arguments are `DDIMScheduler`'s; the spacing and the offset play no part.
        start_time: where the first step starts, in (0, 1]; below 1 all times are that much smaller, and the latents
            start as noise of that level, sigma_t eps.
        ancestral: every step but the last draws from q(z_s | z_t, x0) instead of taking DDIM's.

    Raises:
        BadInput: fewer than one step; a start outside (0, 1].
    """

    @extends_ddim
    def __init__(
        self,
        timestep_spacing: str = "trailing",
        distilled_steps: int = 4,
        start_time: float = 1.0,
        ancestral: bool = False,
    ):
        check_few(distilled_steps, start_time)
        if start_time < 1:
            self.init_noise_sigma = float(self.process.alpha_sigma(start_time)[1])

    @cached_property
    def process(self) -> GaussianProcess:
        """The noise process of the table of betas, in continuous time."""
        return GaussianProcess(DiscreteSchedule.from_alphas_cumprod(self.alphas_cumprod))

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None) -> None:
        """The S timesteps. ``num_inference_steps`` may be left out, be S, or be the 50 of a pipeline's default.

        Raises:
            BadInput: another number; the message says what the model was distilled for.
        """
        steps = self.config.distilled_steps
        if num_inference_steps not in (None, UNASKED):
            check_steps(num_inference_steps, steps)
        self.num_inference_steps = steps
        ends = torch.arange(steps, 0, -1, dtype=torch.float64)
        timesteps = ends * self.config.num_train_timesteps * self.config.start_time / steps - 1
        whole = bool(((timesteps - timesteps.round()).abs() < 1e-6).all())
        self.timesteps = (timesteps.round().to(torch.int64) if whole else timesteps.to(torch.float32)).to(device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As DDIM's, also at timesteps that are fractions."""
        return noised(self, original_samples, noise, timesteps)

    def step(
        self,
        model_output: Float[Tensor, "batch *dims"],
        timestep: float | Tensor,
        sample: Float[Tensor, "batch *dims"],
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From the start of a segment to its end, which is the start of the one below.

        ``generator`` is for ancestral steps: one, or one for each picture; None is torch's global one.
        """
        steps, start = self.config.distilled_steps, self.config.start_time
        segment = round((float(timestep) + 1) / self.config.num_train_timesteps * steps / start)
        t, s = segment / steps * start, (segment - 1) / steps * start
        kind = PREDICTIONS[self.config.prediction_type]
        x0 = self.process.convert(model_output, sample, t, kind, "x0")
        if self.config.thresholding:
            x0 = self._threshold_sample(x0)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        ancestral = self.config.ancestral and segment > 1  # the last step ends without noise
        end, var = self.process.posterior(sample, x0, t, s, eta=1.0 if ancestral else 0.0)
        if ancestral:
            noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            end = self.process.sample(end, var, noise)
        return DDIMSchedulerOutput(prev_sample=end, pred_original_sample=x0) if return_dict else (end, x0)


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):
    """Euler's rule on straight paths z = (1 - t) x0 + t eps, for U-Nets that were reflowed (arXiv:2309.06380).

    In a pipeline of Stable Diffusion 1.x, 2.x or SDXL it says that the network's output is the flow eps - x0, and that
    it is told T t: exactly T at pure noise, which no table of betas has. N steps start at t = 1, (N - 1) / N, ...,
    1 / N. Draws nothing unless ``ancestral``.

    Args:
        num_train_timesteps: T.
        distilled_steps: the only N that is taken, for a model that was distilled; asked for none, or for the 50 of a
            pipeline's default, it is this. None: any.
        start_time: as of `FewStepScheduler`.
        ancestral: as of `FewStepScheduler`.

    Raises:
        BadInput: fewer than one step; a start outside (0, 1].
    """

    order = 1
    process = GaussianProcess(RectifiedFlow())

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        distilled_steps: int | None = None,
        start_time: float = 1.0,
        ancestral: bool = False,
    ):
        check_few(distilled_steps, start_time)
        self.init_noise_sigma = start_time
        self.set_timesteps()

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None) -> None:
        """The timesteps T t of so many steps.

        Raises:
            BadInput: a number that the model was not distilled for, or that is less than 1.
        """
        only = self.config.distilled_steps
        if only is not None and num_inference_steps not in (None, UNASKED):
            check_steps(num_inference_steps, only)
        steps = only or num_inference_steps or UNASKED
        if steps < 1:
            raise BadInput(f"a flow takes at least one step, got {steps}")
        self.num_inference_steps = steps
        ends = torch.arange(steps, 0, -1, dtype=torch.float64) / steps * self.config.start_time
        self.timesteps = (ends * self.config.num_train_timesteps).to(torch.float32).to(device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """``sample`` as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - t) x0 + t eps at timesteps T t, one for each picture."""
        t = (timesteps.to(original_samples) / self.config.num_train_timesteps).reshape(
            -1, *[1] * (original_samples.ndim - 1)
        )
        return (1 - t) * original_samples + t * noise

    def step(
        self,
        model_output: Float[Tensor, "batch *dims"],
        timestep: float | Tensor,
        sample: Float[Tensor, "batch *dims"],
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From one timestep to the next: z - (eps - x0) start_time / N, or a draw from q(z_s | z_t, x0).

        ``generator`` is for ancestral steps: one, or one for each picture; None is torch's global one.
        """
        span = self.config.start_time / self.num_inference_steps
        left = round(float(timestep) / self.config.num_train_timesteps / span)  # steps, this one too
        if self.config.ancestral and left > 1:  # the last step ends without noise
            t = left * span
            mean, var = self.process.posterior(sample, sample - t * model_output, t, (left - 1) * span)
            end = self.process.sample(mean, var, randn_tensor(sample.shape, generator, sample.device, sample.dtype))
        else:
            end = sample - span * model_output
        return SchedulerOutput(prev_sample=end) if return_dict else (end,)
