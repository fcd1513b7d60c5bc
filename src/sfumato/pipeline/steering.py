"""Between a pipeline and its network while it samples: whose call it is, of which step, and what takes its place.

`Text2Image.intercept` puts an `Interceptor` there, for ``Text2Image.draw`` and for diffusers' own pipeline call
alike. For the length of the block the network's ``forward`` and three methods of the scheduler pass through here:
``set_timesteps`` begins a run, ``scale_model_input`` a step, ``step`` ends it (`sfumato.pipeline.runs`). Calls of the
network outside a step, such as those of a loss, belong to no run, and a run is forgotten when it ends or another one
begins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .anatomy import Call
from .conditioning import Conditioning
from .hooks import Override, forward_name
from .organs import Organs
from .runs import Asked, Follower, Run

Place = Literal["conditioning", "attention", "features", "prediction"]
PLACES: tuple[Place, ...] = get_args(Place)
"""Where a pipeline can be steered, in the order of acting, whatever the order of entering."""
_OUTWARDS: tuple[Place, ...] = ("features", "attention", "conditioning", "prediction")
"""The order in which those who stand before the network do so, the nearest first: what runs the network in parts
(features) is given the conditioning that the others have made."""


Forward = Callable[[Call], Float[Tensor, "batch channel height width"]]


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
    """All that acts on one network at the moment: patches, interceptors, and the runs in progress.

    Attributes:
        holders: how many need it; the last to go closes it.
        asked: what the pipeline has encoded since the last run began.
    """

    def __init__(self, owner: Organs):
        self.owner = owner
        self.anatomy = owner.anatomy
        self.patches: list[Any] = []
        self.interceptors: list[tuple[Place, Interceptor]] = []
        self.current: Run | None = None
        self.holders = 0
        self.asked: list[Asked] = []
        self._followers: list[Follower] = []
        network = self.network = owner.network
        self._overrides = [Override(network, forward_name(network), self._call)]
        if (control := owner.control) is not None:
            self._overrides.append(Override(control, forward_name(control), self._control))
        if hasattr(owner.pipe, owner.told_by):
            self._overrides.append(Override(owner.pipe, owner.told_by, self._asked))
        self.follow_pipeline()

    def follow_pipeline(self) -> None:
        """Follow the scheduler that the pipeline has now; it may be exchanged inside a block."""
        scheduler = self.owner.pipe.scheduler
        if not any(f.scheduler is scheduler for f in self._followers):
            self._followers.append(Follower(self, scheduler))

    @contextmanager
    def following(self, scheduler: Any) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """Follow a scheduler of ours in a block; gives what `following` gives."""
        follower = Follower(self, scheduler, attended=True)
        self._followers.append(follower)
        try:
            yield follower.attend
        finally:
            follower.remove()
            self._followers.remove(follower)

    def close(self) -> None:
        for override in self._overrides:
            override.remove()
        for follower in self._followers:
            follower.remove()

    def chain(self, method: str) -> list[Callable]:
        """The interceptors' methods in the order of acting; of ``predict``, each is called by the one after it."""
        order = _OUTWARDS if method == "predict" else PLACES
        ordered = sorted(self.interceptors, key=lambda pair: order.index(pair[0]))
        return [getattr(interceptor, method) for _, interceptor in ordered]

    def halves(self, run: Run) -> Literal["together", "apart"] | None:
        """How the pipeline's own call guides in this run: both halves in one batch, one after the other, or not."""
        known = getattr(self.owner.pipe, "do_classifier_free_guidance", None)
        if known is None and run.asked:
            known = run.asked[-1].guided
            if known is None:  # it encodes what to steer away from by itself, and only if it guides
                return "apart" if len(run.asked) > 1 else None
        return self.owner.halves if known else None

    def _asked(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        told = bound.arguments
        if not any(told.get("input_images") or ()):  # with pictures there are three branches, and more than texts
            prompts = told.get("prompt") or ()
            prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
            self.asked.append(Asked(prompts, told.get("do_classifier_free_guidance", self.owner.guides)))
        return original(*args, **kwargs)

    def _control(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        z = args[0] if args else kwargs[next(iter(inspect.signature(original).parameters))]
        forward = partial(original, *args, **kwargs)
        for control in self.chain("control"):
            forward = partial(control, forward, z, self.current)
        return forward()

    def _call(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        self.follow_pipeline()
        call = self._placed(self.anatomy.read(args, kwargs))
        run, latest = self.current, None

        def network(c: Call) -> Tensor:
            nonlocal latest
            given, named = self.anatomy.arguments(c.z, c.timestep, c.inputs)
            with c.told():
                latest = original(*given, **named, return_dict=False)[0]
            return self.anatomy.prediction(latest, c.z)

        forward: Forward = network
        for predict in self.chain("predict"):
            forward = _changed(predict, forward, run)
        try:
            with call.told():
                out = self.anatomy.result(forward(call), latest)
        except BaseException:
            self.current = None  # this step will not end
            raise
        return self.anatomy.output(sample=out) if self.anatomy.asks_for_dict(args, kwargs) else (out,)

    def _placed(self, call: Call) -> Call:
        """The call with what the run and its maker say of it: step, and which rows are conditional."""
        context = self.anatomy.context
        call = replace(call, rows=context.rows if context.own else None)
        for follower in self._followers:
            call = follower.arrive(call, context.own)
        run = self.current
        if context.own and context.cond is not None:
            call = replace(call, encoded=partial(_conditional, context.cond, call.rows))
        if run is None:
            return call
        rows = call.rows if context.own else self._rows(len(call.z), run, call.z.device)
        if not context.own:
            run.calls += 1
            call = replace(call, encoded=partial(_spread, run, len(call.z) if rows is None else int(rows.sum())))
        return replace(call, rows=rows, step=run.index)

    def _rows(self, n: int, run: Run, device: torch.device) -> Bool[Tensor, "batch"] | None:
        """Which of the rows that diffusers' own call makes are conditional: where both halves are in one batch the
        second one (or the first, where the family has it so), and where there are two calls the first."""
        halves = self.halves(run)
        if halves == "apart":
            return torch.full((n,), run.calls == 0, device=device)
        if halves == "together" and n == 2 * run.pictures:
            return (torch.arange(n, device=device) < run.pictures) == self.owner.conditional_first
        return None


def _conditional(cond: Conditioning, rows: Bool[Tensor, "batch"] | None) -> Conditioning:
    """The conditional rows; of texts of which there is not one a row, none is known."""
    if len(cond.prompts) != len(cond):
        cond = cond.replace(prompts=cond.prompts * len(cond) if len(cond.prompts) == 1 else ())
    return cond if rows is None else cond[rows.cpu()]


def _spread(run: Run, rows: int) -> Conditioning | None:
    """What was said in a run, in so many rows: pipelines draw a prompt several times in succession."""
    said = run.said
    return None if said is None or rows % len(said) else said.repeat(rows // len(said))


def _changed(predict: Callable[..., Tensor], forward: Forward, run: Run | None) -> Forward:
    """``forward`` as an interceptor's ``predict`` changes it."""
    return lambda call: predict(forward, call, run)


def of(network: nn.Module) -> Steering | None:
    """What acts on this network at the moment."""
    return _active.get(network)


@contextmanager
def held(p: Organs) -> Iterator[Steering]:
    """The steering of a pipeline's network, begun by the first who needs it and closed by the last."""
    steering = _active.get(p.network)
    if steering is None:
        steering = _active[p.network] = Steering(p)
    steering.holders += 1
    try:
        yield steering
    finally:
        steering.holders -= 1
        if not steering.holders:
            steering.close()
            _active.pop(p.network, None)


@contextmanager
def intercept(p: Organs, interceptor: Interceptor, place: Place) -> Iterator[None]:
    """See `Text2Image.intercept`."""
    with held(p) as steering:
        if place == "features" and any(other == place for other, _ in steering.interceptors):
            raise BadInput("two methods that run the halves of the network apart cannot act together: use one of them")
        entry = (place, interceptor)
        steering.interceptors.append(entry)
        try:
            yield
        finally:
            steering.interceptors.remove(entry)


@contextmanager
def patched(p: Organs, patch: Any) -> Iterator[Any]:
    """Note in a block that ``patch`` acts; gives the adapter through which earlier ones act on the same network.

    Raises:
        BadInput: a patch of that class acts already.
    """
    with held(p) as steering:
        if any(type(other) is type(patch) for other in steering.patches):
            raise BadInput(f"{type(patch).__name__} acts on this pipeline already: leave its block first")
        steering.patches.append(patch)
        try:
            yield steering.owner
        finally:
            steering.patches.remove(patch)


@contextmanager
def following(p: Organs, scheduler: Any) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Tell who steers ``p`` about a run of this scheduler, to be entered before its timesteps are set.

    Gives a context manager to put around the network's calls of each step.
    """
    steering = of(p.network)
    if steering is None:
        yield nullcontext
        return
    with steering.following(scheduler) as attend:
        yield attend
