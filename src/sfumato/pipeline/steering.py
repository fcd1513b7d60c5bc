"""Between a pipeline and its network while it samples: whose call it is, of which step, and what takes its place.

`Text2Image.intercept` puts an `Interceptor` there, for ``Text2Image.draw`` and for diffusers' own pipeline call
alike. For the length of the block the network's ``forward`` and three methods of the scheduler pass through here:
``set_timesteps`` begins a run, ``scale_model_input`` a step, ``step`` ends it. Calls of the network outside a step,
such as those of a loss, belong to no run, and a run is forgotten when it ends or another one begins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .hooks import Override, forward_name

if TYPE_CHECKING:
    from .base import Text2Image

Place = Literal["conditioning", "attention", "features", "prediction"]
PLACES: tuple[Place, ...] = get_args(Place)
"""Where a pipeline can be steered, in the order of acting, whatever the order of entering."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the network.

    Attributes:
        network: who is called.
        z: its input, as scaled by the scheduler; with guidance, both halves.
        timestep: one for all rows, or one a row.
        inputs: all else that it is given, by name (``encoder_hidden_states``, ``added_cond_kwargs``, ...).
    """

    network: nn.Module
    z: Float[Tensor, "batch channel height width"]
    timestep: Tensor | float
    inputs: dict[str, Any]


Forward = Callable[[Call], Float[Tensor, "batch channel height width"]]


class Run:
    """One sampling run as an `Interceptor` sees it.

    Attributes:
        timesteps: the run's timesteps, the noisiest first; schedulers of second order have two of some.
        T: how many timesteps training had.
        index: number of the step in progress, from 0.
        pictures: how many are sampled together; with guidance the network's batch is a multiple.
    """

    def __init__(self, scheduler: Any):
        self.timesteps = [float(t) for t in scheduler.timesteps.tolist()]
        self.T = int(scheduler.config.num_train_timesteps)
        self.index, self.pictures = 0, 0
        self._start: Tensor | None = None
        self._scales: tuple[Tensor, Tensor] | None = None

    def at(self, timestep: Tensor | float) -> bool:
        """Whether a call with this timestep is at the present step's time (and not, say, a less noisy one's)."""
        away = torch.as_tensor(timestep).float() - self.timesteps[self.index]
        return bool((away.abs() < 0.01).all())

    def noise(self, z: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The latent from which the run started, in the scale and with as many rows as a latent of this step.

        Schedulers that keep z / alpha instead of the variance-preserving z scale it from step to step.
        """
        first, now = self._scales
        start = self._start * (first / now)
        return start[: len(z)] if len(start) >= len(z) else start.repeat(len(z) // len(start), *[1] * (z.ndim - 1))

    def find(self, timestep: Tensor | float) -> bool:
        """Move to the next step with this timestep; whether there is one."""
        later = [i for i, t in enumerate(self.timesteps) if i >= self.index and t == float(timestep)]
        self.index = later[0] if later else self.index
        return bool(later)

    def see(self, z: Tensor, scale: Tensor) -> None:
        """Note the latent of this step, and by how much its scheduler scales the network's input."""
        if self._start is None:
            self._start, self._scales = z.detach().clone(), (scale, scale)
        self._scales = (self._scales[0], scale)


class Interceptor:
    """What a patch does between pipeline and network; each method does nothing unless it is overridden."""

    def start(self, run: Run) -> None:
        """A run begins; raise `BadInput` if it cannot be done."""

    def before_network(self, run: Run, z: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The latent from which the network's input is made. To change the latent for good, change it here and in
        `before_update` alike."""
        return z

    def control(self, forward: Callable[[], Any], z: Float[Tensor, "batch ..."], run: Run | None) -> Any:
        """What takes the place of the residuals that the pipeline's ControlNet, if it has one, makes of ``z``; the
        network's call comes after it."""
        return forward()

    def predict(self, forward: Forward, call: Call, run: Run | None) -> Float[Tensor, "batch ..."]:
        """What takes the place of the network's output; ``run`` is None for a call outside of sampling."""
        return forward(call)

    def before_update(self, run: Run, z: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The latent that the scheduler's update starts from."""
        return z


_active: WeakKeyDictionary[nn.Module, Steering] = WeakKeyDictionary()


class Steering:
    """All that acts on one network at the moment: patches, interceptors, and the runs in progress."""

    def __init__(self, owner: Text2Image):
        self.owner = owner
        self.patches: list[Any] = []
        self.interceptors: list[tuple[Place, Interceptor]] = []
        self.current: Run | None = None
        self._followers: list[_Follower] = []
        network = self.network = owner.network
        self._signature = inspect.signature(network.forward)
        self._overrides = [Override(network, forward_name(network), self._call)]
        if (control := owner.control) is not None:
            self._overrides.append(Override(control, forward_name(control), self._control))
        self.follow_pipeline()

    def follow_pipeline(self) -> None:
        """Follow the scheduler that the pipeline has now; it may be exchanged inside a block."""
        scheduler = self.owner.pipe.scheduler
        if not any(f.scheduler is scheduler for f in self._followers):
            self._followers.append(_Follower(self, scheduler))

    def close(self) -> None:
        for override in self._overrides:
            override.remove()
        for follower in self._followers:
            follower.remove()

    def chain(self, method: str) -> list[Callable]:
        """The interceptors' methods in the order of acting."""
        ordered = sorted(self.interceptors, key=lambda pair: PLACES.index(pair[0]))
        return [getattr(interceptor, method) for _, interceptor in ordered]

    def _control(self, original: Callable, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward = partial(original, sample, *args, **kwargs)
        for control in self.chain("control"):
            forward = partial(control, forward, sample, self.current)
        return forward()

    def _call(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        as_dict = given.pop("return_dict", True)
        call = Call(self.network, given.pop("sample"), given.pop("timestep"), given)
        forward: Forward = lambda c: original(c.z, c.timestep, **c.inputs, return_dict=False)[0]
        run = self.current
        self.follow_pipeline()
        for predict in self.chain("predict"):
            forward = lambda c, predict=predict, inner=forward: predict(inner, c, run)
        try:
            out = forward(call)
        except BaseException:
            self.current = None  # this step will not end
            raise
        return UNet2DConditionOutput(sample=out) if as_dict else (out,)


class _Follower:
    """Tells a `Steering` about the runs of one scheduler."""

    def __init__(self, steering: Steering, scheduler: Any, attended: bool = False):
        self.steering, self.scheduler, self.attended = steering, scheduler, attended
        self.run: Run | None = None
        self.scale = scheduler.scale_model_input
        methods = (self.set_timesteps, self.scale_model_input, self.step)
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
        sample = self._before("before_network", sample, timestep)
        guided = not self.attended and getattr(self.steering.owner.pipe, "do_classifier_free_guidance", False)
        if self.run is not None:
            self.run.pictures = len(sample) // (2 if guided else 1)
            if not self.attended:
                self.steering.current = self.run
        return original(sample) if timestep is None else original(sample, timestep)

    def step(
        self, original: Callable, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        sample = self._before("before_update", sample, timestep)
        result = original(model_output, timestep, sample, *args, **kwargs)
        if not self.attended:
            self.steering.current = None
        if self.run is not None:
            self.run.index += 1
            if self.run.index == len(self.run.timesteps):
                self._end()
        return result

    def _before(self, method: str, z: Tensor, timestep: Any) -> Tensor:
        if self.run is None and getattr(self.scheduler, "timesteps", None) is not None:
            self._begin()  # the scheduler came in after its timesteps were set
        if self.run is None or timestep is None or not self.run.find(timestep):
            return z
        self.run.see(z, self.scale(z.new_ones(()), timestep))
        for function in self.steering.chain(method):
            z = function(self.run, z)
        return z

    def _begin(self) -> None:
        self.run = Run(self.scheduler)
        for start in self.steering.chain("start"):
            start(self.run)

    def _end(self) -> None:
        if self.steering.current is self.run:
            self.steering.current = None
        self.run = None


def of(network: nn.Module) -> Steering | None:
    """What acts on this network at the moment."""
    return _active.get(network)


@contextmanager
def _steering(p: Text2Image) -> Iterator[Steering]:
    """The steering of a pipeline's network, begun by the first who needs it and closed by the last."""
    steering = _active.get(p.network)
    if steering is None:
        steering = _active[p.network] = Steering(p)
    try:
        yield steering
    finally:
        if not steering.patches and not steering.interceptors:
            steering.close()
            _active.pop(p.network, None)


@contextmanager
def intercept(p: Text2Image, interceptor: Interceptor, place: Place) -> Iterator[None]:
    """See `Text2Image.intercept`."""
    with _steering(p) as steering:
        if place == "features" and any(other == place for other, _ in steering.interceptors):
            raise BadInput("two methods that run the halves of the network apart cannot act together: use one of them")
        entry = (place, interceptor)
        steering.interceptors.append(entry)
        try:
            yield
        finally:
            steering.interceptors.remove(entry)


@contextmanager
def patched(p: Text2Image, patch: Any) -> Iterator[Text2Image]:
    """Note in a block that ``patch`` acts; gives the adapter through which earlier ones act on the same network.

    Raises:
        BadInput: a patch of that class acts already.
    """
    with _steering(p) as steering:
        if any(type(other) is type(patch) for other in steering.patches):
            raise BadInput(f"{type(patch).__name__} acts on this pipeline already: leave its block first")
        steering.patches.append(patch)
        try:
            yield steering.owner
        finally:
            steering.patches.remove(patch)


@contextmanager
def following(p: Text2Image, scheduler: Any) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Tell who steers ``p`` about a run of this scheduler, to be entered before its timesteps are set.

    Gives a context manager to put around the network's calls of each step.
    """
    steering = of(p.network)
    if steering is None:
        yield nullcontext
        return
    follower = _Follower(steering, scheduler, attended=True)
    try:
        yield follower.attend
    finally:
        follower.remove()
