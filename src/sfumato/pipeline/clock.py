"""`Clock`: the noise process that a pipeline's network was trained under, and how it and its scheduler count time.

Three numbers stand for one moment: the *time* in [0, 1] (1 = noise) in which this package counts, the *timestep* of a
diffusers scheduler, and the *number* that the network is told. There are two kinds of clock: a table of alphas
(Stable Diffusion, PixArt) and a flow (SD3, Flux).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.noise import DiscreteSchedule, GaussianProcess, RectifiedFlow
from sfumato.noise.process import Prediction
from sfumato.sample.scheduler import PREDICTIONS, tells_log_sigma
from sfumato.sample.schedulers import ADDIMScheduler, RectifiedFlowScheduler
from sfumato.text import counted

from .drawing import first_step

Solvers = Mapping[str, Callable[[Mapping[str, Any]], Any]]
"""Schedulers by name, each made from the configuration of the pipeline's own."""


@dataclass(frozen=True)
class Clock(ABC):
    """How a network counts time; `TableClock` or `FlowClock`.

    Attributes:
        process: the noise process; its times are those of this clock.
        prediction: what the network predicts.
        timesteps: how many timesteps training had, T.
    """

    process: GaussianProcess
    prediction: Prediction
    timesteps: int

    solvers: ClassVar[Solvers]
    """Schedulers that fit this kind of clock, by name; "ddim", the deterministic one, is always among them."""

    @abstractmethod
    def number(self, t: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
        """What the network is told of time ``t`` in [0, 1]: float32, in the shape of ``t``."""

    @abstractmethod
    def time_of(self, number: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
        """The time of which the network is told ``number``: the inverse of `number`, in float64."""

    @abstractmethod
    def time(self, timestep: Tensor | float) -> float:
        """The time in [0, 1] of a scheduler's timestep."""

    def native(self, output: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        """The network's output as the `prediction` that it stands for."""
        return output

    def counting(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """A scheduler's configuration as it counts with this clock: from noise to picture."""
        return config

    def begin(self, solver: Any, steps: int, shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        """Set the timesteps of a scheduler as the pipeline itself would for latents of this ``shape`` (.., h, w)."""
        solver.set_timesteps(steps, device=device)

    def first_step(self, strength: float, steps: int) -> int:
        """At which of so many steps image-to-image of this strength begins; see `drawing.first_step`."""
        return first_step(strength, steps)

    def run(self, solver: Any) -> list[float]:
        """The timesteps that a scheduler is set to, the noisiest first, as this clock counts them."""
        return [float(t) for t in solver.timesteps.tolist()]

    def start(self, solver: Any, noise: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        """The latent from which a scheduler starts, of standard normal ``noise``."""
        return noise * getattr(solver, "init_noise_sigma", 1.0)

    def noised(
        self, solver: Any, first: int, x0: Float[Tensor, "batch *dims"], noise: Float[Tensor, "batch *dims"]
    ) -> Float[Tensor, "batch *dims"]:
        """Clean latents with as much noise as those have from which a scheduler takes its step number ``first``."""
        return self.process.diffuse(x0, self.time(solver.timesteps[first]), noise)

    def scaled(self, solver: Any, z: Float[Tensor, "batch *dims"], timestep: Tensor) -> Float[Tensor, "batch *dims"]:
        """The network's input of a scheduler's latent: alpha x0 + sigma eps, whatever scale the scheduler keeps."""
        return solver.scale_model_input(z, timestep) if hasattr(solver, "scale_model_input") else z

    def fits(self, solver: Any) -> bool:
        """Whether a scheduler counts as this clock does: a table's with a table, a flow's with a flow."""
        return _flows(solver) == (self.prediction == "flow")

    def check(self, solver: Any) -> None:
        """Refuse a scheduler that does not fit.

        Raises:
            BadInput: names those that do.
        """
        if not self.fits(solver):
            kinds = ("a flow", "a table of alphas") if self.prediction == "flow" else ("a table of alphas", "a flow")
            raise BadInput(
                f"this model was trained under {kinds[0]}, and {type(solver).__name__} counts in {kinds[1]}: "
                f"use {', '.join(self.solvers)} or the pipeline's own scheduler"
            )


def _solver(kind: Any, **settings: Any) -> Callable[[Mapping[str, Any]], Any]:
    # Latents are not bounded by 1: clipping, a default meant for pixels, must not sneak in.
    return lambda config: kind.from_config(config, **{"clip_sample": config.get("clip_sample", False), **settings})


@dataclass(frozen=True)
class TableClock(Clock):
    """Timestep i = 0 ... T - 1 stands at t = (i + 1) / T, and the network is told the timestep."""

    solvers: ClassVar[Solvers] = {
        "ddim": _solver(DDIMScheduler),
        "addim": _solver(ADDIMScheduler),
        "dpm++": _solver(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2),
    }

    @classmethod
    def of(cls, scheduler: Any) -> TableClock:
        """The clock of a pipeline with this scheduler.

        Raises:
            BadInput: it has no alphas, a prediction type that is none of epsilon, v_prediction, sample, or timesteps
                that are log sigma.
        """
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in (known := [k for k in PREDICTIONS if k != "flow_prediction"]):
            raise BadInput(f"unsupported prediction type {kind!r}: this pipeline must predict one of {known}")
        if getattr(scheduler, "alphas_cumprod", None) is None:
            raise BadInput(f"{type(scheduler).__name__} has no noise schedule with alphas: use a DDPM-style scheduler")
        if tells_log_sigma(scheduler):
            raise BadInput(
                f"this pipeline's {type(scheduler).__name__} tells the network 0.25 log sigma (timestep_type "
                "'continuous'): models that know no timesteps are not supported"
            )
        alphas = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
        process = GaussianProcess(DiscreteSchedule.from_alphas_cumprod(alphas))
        return cls(process, PREDICTIONS[kind], int(scheduler.config.num_train_timesteps))

    def check(self, solver: Any) -> None:
        super().check(solver)
        if tells_log_sigma(solver) or getattr(solver, "alphas_cumprod", None) is None:
            raise BadInput(
                f"this model is told the timesteps of a table of alphas, and {type(solver).__name__} tells it numbers "
                f"of its own: use {', '.join(self.solvers)} or the pipeline's own scheduler"
            )

    def number(self, t: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
        """t T - 1, snapped to an integer when within 1e-3 of one, and at least 0.

        So float32 times (whose rounding error times T = 1000 stays below 1e-4) give exactly the embedding that
        training used. Times below 1 / T give 0, the least noise that the network has seen.
        """
        x = torch.as_tensor(t, dtype=torch.float64) * self.timesteps - 1.0
        nearest = x.round()
        return torch.where((x - nearest).abs() <= 1e-3, nearest, x).clamp_min(0.0).to(torch.float32)

    def time_of(self, number: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
        return (torch.as_tensor(number, dtype=torch.float64) + 1) / self.timesteps

    def time(self, timestep: Tensor | float) -> float:
        return (float(timestep) + 1) / self.timesteps

    def noised(
        self, solver: Any, first: int, x0: Float[Tensor, "batch *dims"], noise: Float[Tensor, "batch *dims"]
    ) -> Float[Tensor, "batch *dims"]:
        sigmas = getattr(solver, "sigmas", None)
        if sigmas is None:
            return super().noised(solver, first, x0, noise)
        # Sigmas spaced by a rule of their own (Karras's) lie between timesteps, and some schedulers round these.
        sigma = float(sigmas[first])
        return (x0 + sigma * noise) / (1 + sigma**2) ** 0.5

    def begin(self, solver: Any, steps: int, shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        if steps < getattr(solver, "pndm_order", 0) and not solver.config.skip_prk_steps:
            raise BadInput(_too_few(solver, steps))
        super().begin(solver, steps, shape, device)
        if (first := float(solver.timesteps.max())) > self.timesteps - 1:
            raise BadInput(
                f"{counted(steps, 'step')} of this pipeline's {type(solver).__name__} begin at timestep {first:g}, and "
                f"the last that the model knows is {self.timesteps - 1}: ask for fewer steps"
            )


def _shift(config: Mapping[str, Any]) -> float:
    """A flow scheduler's shift, under whichever name its class has it."""
    return config.get("shift", config.get("flow_shift", 1.0))


def _euler(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler | RectifiedFlowScheduler:
    if "shift" not in config and "flow_shift" not in config:  # times of its own, of which the last step starts at 1 / N
        return RectifiedFlowScheduler.from_config(config)
    return FlowMatchEulerDiscreteScheduler.from_config(config, shift=_shift(config))


def _dpm(config: Mapping[str, Any]) -> DPMSolverMultistepScheduler:
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": _shift(config)}
    known = {k: v for k, v in config.items() if k != "shift"}  # under this name it would be warned of
    return DPMSolverMultistepScheduler.from_config(known, algorithm_type="dpmsolver++", solver_order=2, **settings)


@dataclass(frozen=True)
class FlowClock(Clock):
    """alpha = 1 - t, sigma = t, and the network predicts eps - x0; a scheduler's timestep is T sigma.

    The shift of SD3 and Flux says at which times a scheduler stops, not what a time means: it belongs to `begin`.

    Attributes:
        scale: the number that the network is told at t = 1: T, 1 (Flux), or T times a ``timestep_scale``.
        patch: latents a token, along a side; a scheduler's dynamic shift goes by the number of tokens.
        even: the steps are spaced over [1 / steps, 1] (Flux) instead of as the scheduler does it by itself.
        backward: the number falls from ``scale`` at the picture to 0 at the noise.
        negated: the network's output is x0 - eps.
        shift: mu of a scheduler with a dynamic shift, for so many tokens and steps; None: `dynamic_shift`.
    """

    scale: float = 1000.0
    patch: int = 2
    even: bool = False
    backward: bool = False
    negated: bool = False
    shift: Callable[[int, int], float] | None = None

    # The deterministic step of DDIM is Euler's here: z_s = z_t + (s - t) (eps - x0).
    solvers: ClassVar[Solvers] = {"ddim": _euler, "dpm++": _dpm}

    @classmethod
    def of(cls, scheduler: Any, **settings: Any) -> FlowClock:
        """The clock of a pipeline with this scheduler; ``settings`` are this class's own.

        Raises:
            BadInput: the scheduler is not one of flow matching, or counts from the picture to the noise.
        """
        if not _flows(scheduler) or scheduler.config.get("invert_sigmas"):
            name = type(scheduler).__name__
            raise BadInput(f"{name} does not fit a model of flow matching: use FlowMatchEulerDiscreteScheduler")
        steps = int(scheduler.config.num_train_timesteps)
        return cls(GaussianProcess(RectifiedFlow()), "flow", steps, **{"scale": float(steps), **settings})

    def number(self, t: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
        x = torch.as_tensor(t, dtype=torch.float64)
        return (self.scale * (1 - x if self.backward else x)).to(torch.float32)

    def time_of(self, number: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
        x = torch.as_tensor(number, dtype=torch.float64) / self.scale
        return 1 - x if self.backward else x

    def time(self, timestep: Tensor | float) -> float:
        return float(timestep) / self.timesteps

    def native(self, output: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        return -output if self.negated else output

    def first_step(self, strength: float, steps: int) -> int:
        return first_step(strength, steps, up=True)

    def run(self, solver: Any) -> list[float]:
        """The timesteps of one that counts from the picture to the noise are turned over."""
        found = super().run(solver)
        if not solver.config.get("invert_sigmas"):
            return found
        return [self.timesteps * (1 - t / solver.config.num_train_timesteps) for t in found]

    def begin(self, solver: Any, steps: int, shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        options: dict[str, Any] = {"device": device}
        spaced = self.even and not solver.config.get("use_flow_sigmas")
        wanted = [n for n, asked in (("sigmas", spaced), ("mu", solver.config.get("use_dynamic_shifting"))) if asked]
        if lacks := [n for n in wanted if n not in inspect.signature(solver.set_timesteps).parameters]:
            raise BadInput(
                f"{type(solver).__name__} cannot be set to the times of this model (its set_timesteps takes no "
                f"{lacks[0]}): use {' or '.join(self.solvers)}"
            )
        if solver.config.get("use_dynamic_shifting"):
            tokens = (shape[-2] // self.patch) * (shape[-1] // self.patch)
            options["mu"] = self.shift(tokens, steps) if self.shift else dynamic_shift(tokens, solver.config)
        if spaced:
            solver.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **options)
        else:
            solver.set_timesteps(steps, **options)
        if not solver.timesteps.isfinite().all():  # a single step that is to end at a time of its own (shift_terminal)
            raise BadInput(_too_few(solver, steps))


def _too_few(solver: Any, steps: int) -> str:
    return f"this pipeline's {type(solver).__name__} cannot make {counted(steps, 'step')}: ask for more"


def dynamic_shift(tokens: int, config: Mapping[str, Any]) -> float:
    """mu of a flow scheduler for a picture of so many tokens: linear between the configuration's two ends."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


def _flows(solver: Any) -> bool:
    config = solver.config
    table = "beta_schedule" in config and not config.get("use_flow_sigmas")  # some schedulers can be either
    return not table and config.get("prediction_type", "flow_prediction") == "flow_prediction"
