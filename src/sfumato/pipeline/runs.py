"""Sampling runs as a scheduler tells of them, ours or that of diffusers' own pipeline call.

Where nobody asks the scheduler to scale the network's input (those of flows cannot, and some pipelines do not ask),
the first call of the network at the next timestep begins the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .anatomy import Anatomy, Call
from .conditioning import Conditioning
from .hooks import Override


@dataclass(frozen=True)
class Asked:
    """What a pipeline asked its text encoders for.

    Attributes:
        prompts: the texts; none where it had embeddings already.
        guided: whether for both halves of guidance; None where it cannot say.
    """

    prompts: tuple[str, ...]
    guided: bool | None


class Steered(Protocol):
    """What a run asks of `Steering`: all that acts on one network."""

    owner: Any
    anatomy: Anatomy
    current: Run | None
    asked: list[Asked]

    def chain(self, method: str) -> list[Callable]: ...
    def halves(self, run: Run) -> Literal["together", "apart"] | None: ...


class Run:
    """One sampling run as an `Interceptor` sees it.

    Attributes:
        timesteps: the run's timesteps, the noisiest first; schedulers of second order have two of some. They are those
            of the pipeline's clock.
        T: how many timesteps training had.
        index: number of the step in progress, from 0.
        pictures: how many are sampled together; with guidance the network's batch is a multiple.
        calls: how often the pipeline has called the network in this step so far.
    """

    def __init__(self, scheduler: Any, steering: Steered | None = None):
        self._found = self.timesteps = [float(t) for t in scheduler.timesteps.tolist()]
        self.T = int(scheduler.config.num_train_timesteps)
        self.index, self.pictures, self.calls = 0, 0, 0
        self.asked = [] if steering is None else steering.asked
        self.unpacked: Callable[[Tensor], Tensor] | None = None
        self._owner = None if steering is None else steering.owner
        self._clock = None if self._owner is None else self._owner.clock
        if self._clock is not None:
            self.timesteps, self.T = self._clock.run(scheduler), self._clock.timesteps
        self._start: Tensor | None = None
        self._scales: tuple[Tensor, Tensor] | None = None

    @cached_property
    def said(self) -> Conditioning | None:
        """The prompts that diffusers' own call draws in this run, one row each; None where they are not known.

        They are encoded a second time when this is first asked for.
        """
        prompts = self.asked[0].prompts if self.asked else ()
        with torch.no_grad():
            return self._owner.encode(list(prompts)) if prompts and self._owner is not None else None

    def at(self, number: Tensor | float, index: int | None = None) -> bool:
        """Whether a call with this number of the network's is at the present step's time (and not, say, a less noisy
        one's), or at that of step ``index``."""
        number = torch.as_tensor(number)
        meant = self.timesteps[self.index if index is None else index]
        away = number.float() - meant
        if self._clock is not None:
            away = self.T * (self._clock.time_of(number) - self._clock.time(meant))
        # Pipelines round the number to the precision of their latents.
        rounding = torch.finfo(number.dtype).eps * abs(meant) if number.is_floating_point() else 0.0
        return bool((away.abs() < 0.01 + rounding).all())

    def noise(self, z: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The latent from which the run started, in the scale and with as many rows as a latent of this step.

        Schedulers that keep z / alpha instead of the variance-preserving z scale it from step to step.
        """
        first, now = self._scales
        start = self._start * (first / now)
        return start[: len(z)] if len(start) >= len(z) else start.repeat(len(z) // len(start), *[1] * (z.ndim - 1))

    def find(self, timestep: Tensor | float) -> bool:
        """Move to the next step with this timestep; whether there is one."""
        later = [i for i, t in enumerate(self._found) if i >= self.index and t == float(timestep)]
        self.index = later[0] if later else self.index
        return bool(later)

    def reach(self, number: Tensor | float) -> bool:
        """Move to the next step at this number of the network's; whether there is one."""
        later = [i for i in range(self.index, len(self.timesteps)) if self.at(number, i)]
        self.index = later[0] if later else self.index
        return bool(later)

    def see(self, z: Tensor, scale: Tensor) -> None:
        """Note the latent of this step, and by how much its scheduler scales the network's input."""
        if self._start is None:
            self._start, self._scales = z.detach().clone(), (scale, scale)
        self._scales = (self._scales[0], scale)


class Follower:
    """Tells a `Steering` about the runs of one scheduler."""

    def __init__(self, steering: Steered, scheduler: Any, attended: bool = False):
        self.steering, self.scheduler, self.attended = steering, scheduler, attended
        self.run: Run | None = None
        self.scale = getattr(scheduler, "scale_model_input", None)
        self.scales = False  # until somebody asks it to
        methods: list[Callable[..., Any]] = [self.set_timesteps, self.step]
        if self.scale is not None:
            methods.append(self.scale_model_input)
        self.overrides = [Override(scheduler, m.__name__, m) for m in methods]

    def remove(self) -> None:
        for override in self.overrides:
            override.remove()
        self._end()

    @contextmanager
    def attend(self) -> Iterator[None]:
        """The network's calls inside the block belong to this scheduler's step."""
        self.steering.current = self.run
        try:
            yield
        finally:
            self.steering.current = None

    def set_timesteps(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._end()
        self._begin()
        return result

    def scale_model_input(self, original: Callable, sample: Tensor, timestep: Any = None) -> Tensor:
        self.scales = True
        sample = self._before("before_network", sample, timestep)
        run = self.run
        if run is not None:
            guided = not self.attended and self.steering.halves(run) == "together"
            run.pictures, run.calls = len(sample) // (2 if guided else 1), 0
            if not self.attended:
                self.steering.current = run
        return original(sample) if timestep is None else original(sample, timestep)

    def arrive(self, call: Call, own: bool) -> Call:
        """A call of the network comes: where its input was not scaled, it may be what begins the step.

        ``own``: whether it is of our making.
        """
        run = self.run
        ours = self.steering.current is run if self.attended else not own
        if self.scales or run is None or not ours or not run.reach(call.timestep):
            return call
        if run.calls == 0:
            both = self.steering.halves(run) == "together" if not own else _mixed(call.rows)
            run.pictures = len(call.z) // (2 if both else 1)
            run.unpacked = partial(self.steering.anatomy.unpacked, inputs=call.inputs)
        if not self.attended:
            self.steering.current = run
        run.see(call.z, call.z.new_ones(()))
        z = call.z
        for function in self.steering.chain("before_network"):
            z = function(run, z)
        return replace(call, z=z)

    def step(
        self, original: Callable, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        sample = self._before("before_update", sample, timestep)
        result = original(model_output, timestep, sample, *args, **kwargs)
        if not self.attended:
            self.steering.current = None
        if self.run is not None:
            self.run.index += 1
            self.run.calls = 0
            if self.run.index == len(self.run.timesteps):
                self._end()
        return result

    def _before(self, method: str, z: Tensor, timestep: Any) -> Tensor:
        if self.run is None and getattr(self.scheduler, "timesteps", None) is not None:
            self._begin()  # the scheduler came in after its timesteps were set
        if self.run is None or timestep is None or not self.run.find(timestep):
            return z
        packed = z.ndim == 3 and self.run.unpacked is not None  # as the pipeline keeps its latents between the steps
        z = self.run.unpacked(z) if packed else z
        self.run.see(z, self.scale(z.new_ones(()), timestep) if self.scales else z.new_ones(()))
        for function in self.steering.chain(method):
            z = function(self.run, z)
        return self.steering.anatomy.packed(z) if packed else z

    def _begin(self) -> None:
        self.run = Run(self.scheduler, self.steering)
        self.steering.asked = []
        for start in self.steering.chain("start"):
            start(self.run)

    def _end(self) -> None:
        if self.steering.current is self.run:
            self.steering.current = None
        self.run = None


def _mixed(rows: Tensor | None) -> bool:
    """Whether a batch holds both halves of guidance."""
    return rows is not None and bool(rows.any()) and not bool(rows.all())
