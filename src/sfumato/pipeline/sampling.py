"""Drawing from a text-to-image pipeline: one walk over a fresh diffusers scheduler, from noise to picture and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, TypeAlias

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from sfumato import catalog
from sfumato.errors import BadInput
from sfumato.progress import bar
from sfumato.sample.inversion import invert as inverted
from sfumato.sample.schedulers import check_steps
from sfumato.text import counted

from . import offload, watermark
from .adapter import Adapter
from .conditioning import Conditioning
from .contract import Condition, Gradient, Guide, Noised, Start, Told
from .drawing import Rows, ToldDenoiser, check_guidance, check_interval, finished, noise, whole
from .organs import Organs
from .steering import following, of


class Rule(Protocol):
    """A sampler with settings that also comes as a scheduler, such as `sfumato.sample.S2N`."""

    def scheduler(self, config: Any) -> SchedulerMixin:
        """The scheduler with the noise table of another one's ``config``."""
        ...


Scheduler: TypeAlias = str | SchedulerMixin | Rule | None


def make_scheduler(p: Organs, scheduler: Scheduler = None):
    """A fresh scheduler with the checkpoint's noise process (by a name that its `Clock` knows, a sampler of the
    catalogue by its name or with settings), a copy of another, or its own.

    Raises:
        BadInput: unknown name, or a scheduler of another kind of process.
    """
    made = _make_scheduler(p, scheduler)
    p.clock.check(made)
    return made


def _make_scheduler(p: Organs, scheduler: Scheduler):
    config, named = p.clock.counting(p.pipe.scheduler.config), p.clock.solvers
    if isinstance(scheduler, str) and scheduler in (methods := {m.name: m for m in catalog.methods("sample")}):
        scheduler = methods[scheduler].load()()
    if hasattr(scheduler, "scheduler"):
        return scheduler.scheduler(config)
    if isinstance(scheduler, str):
        if scheduler not in named:
            names = ", ".join([*named, *methods])
            raise BadInput(f"unknown scheduler {scheduler!r}: use one of {names}, or a diffusers scheduler")
        return named[scheduler](config)
    chosen = p.pipe.scheduler if scheduler is None else scheduler
    return type(chosen).from_config(p.clock.counting(chosen.config))


def draw(
    p: Organs,
    asked: str | Sequence[str] | Conditioning | None,
    seeds: int | Sequence[int],
    *,
    sampling_steps: int | None = None,
    cfg_scale: float | None = None,
    cfg_interval: tuple[float, float] | None = None,
    negative: str | Conditioning | None = None,
    scheduler: Scheduler = None,
    eta: float = 0.0,
    size: int | None = None,
    batch: int = 32,
    start: Start | None = None,
    cond: Told | None = None,
    guide: Guide | None = None,
    grad: Gradient = False,
    progress: bool = False,
) -> Float[Tensor, "n 3 height width"]:
    """One picture in [0, 1] per (prompt, seed), on the CPU, in float32; see `Model.draw`.

    Args:
        cfg_interval: (low, high): guide only at times in it.
        scheduler: "ddim", "addim", "dpm++", a sampler of the catalogue ("s2n", or ``S2N(rho=0.3)``), a diffusers
            scheduler (its class and settings), or None for the pipeline's.
        eta: 0 is deterministic, 1 ancestral; for schedulers that know it (DDIM).

    A pipeline that knows subjects whose pictures are to be marked (`sfumato.pipeline.customization`) marks each.

    Raises:
        BadInput: a gradient of pictures that are to be marked.
        MarkFailed: a mark was not read back; no picture is returned.
    """
    marked = p.defaults.get("marked")
    if marked is not None and grad:
        raise BadInput("pictures of this pipeline are marked, which has no gradient: draw them without grad")
    rows = Rows.make(p, asked, seeds, cond, start, negative, size)
    walk = _Walk(p, sampling_steps, cfg_scale, cfg_interval, scheduler, eta, size, guide, grad)
    chunks = rows.chunks(batch)
    pictures = []
    with torch.set_grad_enabled(bool(grad)), bar("drawing", len(chunks) * walk.steps, progress) as advance:
        for chunk in chunks:
            z, _ = _last(walk.states(chunk, advance))
            made = finished(p.decode_latents(z), grad, chunk.seeds)
            if marked is not None:
                said = chunk.asked if isinstance(chunk.asked, list) else [None] * len(chunk)
                made = watermark.marked_pictures(made, watermark.payloads(marked, said, chunk.seeds, made.shape[-1]))
            pictures.append(made)
            offload.put_away(p.pipe)
    return torch.cat(pictures)


@torch.no_grad()
def trajectory(
    p: Organs,
    asked: str | Sequence[str] | Conditioning | None,
    seeds: int | Sequence[int],
    *,
    sampling_steps: int,
    stop_after: int,
    **settings: Any,
) -> tuple[Float[Tensor, "n channel h w"], float]:
    """The noisy latent (alpha x + sigma eps) after ``stop_after`` of ``sampling_steps`` steps, and its time in [0, 1].

    ``stop_after`` 0 gives pure noise at the first timestep; ``sampling_steps`` gives the clean latent at time 0. What
    it gives may be the ``start`` of a draw. All pictures are computed in one batch, with DDIM unless another
    ``scheduler`` is named. Other arguments as in `draw`.

    Raises:
        BadInput: as `draw`; ``stop_after`` outside [0, sampling_steps].
    """
    sampling_steps, stop_after = whole(sampling_steps, "sampling_steps"), whole(stop_after, "stop_after")
    if not 0 <= stop_after <= sampling_steps:
        raise BadInput(f"stop_after must lie between 0 and sampling_steps = {sampling_steps}, got {stop_after}")
    passed = _states(p, asked, seeds, sampling_steps=sampling_steps, **settings)
    # Some schedulers evaluate the network more than once a step: the end is the last state, however numbered.
    return _last(passed) if stop_after == sampling_steps else _last(islice(passed, stop_after + 1))


@torch.no_grad()
def states(
    p: Organs,
    asked: str | Sequence[str] | Conditioning | None,
    seeds: int | Sequence[int],
    *,
    sampling_steps: int,
    **settings: Any,
) -> Iterator[tuple[Float[Tensor, "n channel h w"], float]]:
    """All that `trajectory` passes through: (latent, time) from pure noise to clean, ``sampling_steps`` + 1 of them."""
    yield from _states(p, asked, seeds, sampling_steps=sampling_steps, **settings)


def invert(
    p: Organs, z: Float[Tensor, "n channel h w"], cond: Condition, sampling_steps: int
) -> Float[Tensor, "n channel h w"]:
    """See `Model.invert`: back along the times of the pipeline's deterministic scheduler, "ddim"."""
    end, *visited = reversed(_visited(p, sampling_steps, tuple(z.shape)))
    if end >= visited[0]:  # a draw's last step begins there already, and changes nothing
        end, *visited = visited
    if not visited:
        raise BadInput(f"a draw in {counted(sampling_steps, 'step')} ends where it begins: invert in more steps")
    times = torch.tensor([end, *visited], dtype=torch.float64)
    cond = cond.repeat(len(z)) if len(cond) == 1 else cond
    with gated(p, cond):
        return inverted(p.denoiser, z, times, cond)


def walk(p: Organs, sampling_steps: int) -> Float[Tensor, "steps+1"]:
    """See `Model.walk`: the times of the pipeline's deterministic scheduler, "ddim", at the default picture size."""
    return torch.tensor(_visited(p, sampling_steps, p.latent_shape()), dtype=torch.float64)


def _visited(p: Organs, sampling_steps: int, shape: tuple[int, ...]) -> list[float]:
    """The times of a deterministic draw of latents of that shape, and where its last step ends."""
    solver = make_scheduler(p, "ddim")
    p.clock.begin(solver, _check(p, sampling_steps), shape)
    # Some tables keep their least noise.
    end = 0.0 if solver.config.get("set_alpha_to_one", True) else p.cleanest
    return [*(p.clock.time(t) for t in solver.timesteps), end]


def _states(
    p: Organs,
    asked: Any,
    seeds: int | Sequence[int],
    *,
    cond: Told | None = None,
    start: Start | None = None,
    negative: str | Conditioning | None = None,
    size: int | None = None,
    scheduler: Scheduler = "ddim",
    **settings: Any,
) -> Iterator[tuple[Float[Tensor, "n channel h w"], float]]:
    if "marked" in p.defaults:
        raise BadInput("this pipeline gives marked pictures only, no latents: use draw")
    rows = Rows.make(p, asked, seeds, cond, start, negative, size)
    return _Walk(p, scheduler=scheduler, size=size, **settings).states(rows)


def _last(states: Iterator) -> tuple[Tensor, float]:
    return deque(states, maxlen=1).pop()


def _check(p: Organs, steps: int) -> int:
    steps, T = whole(steps, "sampling_steps"), p.clock.timesteps
    if not 1 <= steps <= T:
        raise BadInput(f"sampling_steps must lie between 1 and {T}, this model's timesteps: got {steps}")
    check_steps(steps, p.distilled_steps)
    return steps


@dataclass
class _Walk:
    """The way from noise to clean latents, with settings as for `draw`."""

    p: Organs
    sampling_steps: int | None = None
    cfg_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    scheduler: Scheduler = None
    eta: float = 0.0
    size: int | None = None
    guide: Guide | None = None
    grad: Gradient = False

    def __post_init__(self) -> None:
        self.steps = _check(self.p, self.p.sampling_steps if self.sampling_steps is None else self.sampling_steps)
        check_interval(self.cfg_interval)
        if not 0 <= self.eta < float("inf"):
            raise BadInput(f"eta must be 0 (deterministic) or more, got {self.eta}")
        self.scale = check_guidance(self.p.defaults["cfg_scale"] if self.cfg_scale is None else self.cfg_scale)
        if self.grad == "checkpoint" and of(self.p.network) is not None:
            raise BadInput("patches cannot follow a step that is computed again in the backward pass: use grad=True")

    def states(self, rows: Rows, advance=lambda: None) -> Iterator[tuple[Float[Tensor, "n channel h w"], float]]:
        """The latents from the start to clean, each with its time."""
        p, clock = self.p, self.p.clock
        solver, generators = make_scheduler(p, self.scheduler), rows.generators()
        options = _step_options(solver, self.eta, generators)
        denoiser, gates = self.told(rows), _Gates(p)
        with following(p, solver) as attend:
            denoiser = replace(denoiser, around=lambda cond: gates(cond, attend))
            clock.begin(solver, self.steps, p.latent_shape(self.size), p.device)
            first, z = self.begin(solver, rows, generators)
            for timestep in solver.timesteps[first:]:
                x, t = clock.scaled(solver, z, timestep), clock.time(timestep)
                yield x, t
                z = solver.step(denoiser(x, t), timestep, z, **options, return_dict=False)[0]
                advance()
        yield z, 0.0

    def told(self, rows: Rows) -> ToldDenoiser:
        """The denoiser with what guidance and caller make of it."""
        p = self.p
        cond = rows.told(lambda prompts: p.encode_in_time(prompts, grad=bool(self.grad), size=self.size))
        guided = self.scale != 1.0 if not isinstance(cond, Condition) else cond.guided_at(self.scale)
        guided = guided or cond is None
        return ToldDenoiser(
            p.denoiser, cond, p.unconditional(len(rows), rows.negative, self.size) if guided else None, self.scale,
            self.cfg_interval, guide=self.guide, rescale=p.rescaled, again=self.grad == "checkpoint",
        )  # fmt: skip

    def begin(self, solver: Any, rows: Rows, generators: list[torch.Generator]) -> tuple[int, Tensor]:
        """The number of the first timestep, and the latent there in the scheduler's own scale."""
        p, start = self.p, rows.start
        if start is None or torch.is_tensor(start):
            start = noise(generators, p.latent_shape(self.size)) if start is None else start
            return 0, p.clock.start(solver, start.to(p.device))
        if isinstance(start, Noised):
            order = getattr(solver, "order", 1)
            first = p.clock.first_step(start.strength, self.steps) * order
            x0 = p.encode_image(start.pictures.to(p.device) * 2 - 1)
            z = p.clock.noised(solver, first, x0, noise(generators, x0.shape[1:]).to(x0))
        else:
            z, time = start[0].to(p.device), start[1]
            times = [p.clock.time(t) for t in solver.timesteps]
            first = max(range(len(times)), key=lambda i: (-abs(times[i] - time), i))
            if abs(times[first] - time) > 0.5 / p.clock.timesteps:
                near = f"{times[first]:.4f}"
                raise BadInput(f"this walk of {self.steps} steps has none at time {time:.4f}: the nearest is at {near}")
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(first)
        # Past whoever follows the scheduler: the step has not begun.
        scaled = getattr(type(solver), "scale_model_input", None)
        return first, z if scaled is None else z / scaled(solver, z.new_ones(()), solver.timesteps[first])


class _Gates:
    """The adapters' gates during a walk: asked anew only where the conditioning is another."""

    def __init__(self, p: Organs):
        self.p = p
        self.cond: Any = None
        self.scales: list[tuple[Adapter, Tensor]] = []

    @contextmanager
    def __call__(self, cond: Any, attend: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """In the block the adapters act as strongly as ``cond`` asks, and the network's calls are attended."""
        if cond is not self.cond:
            self.cond, self.scales = cond, _gates(self.p, cond)
        with _scaled(self.scales), attend():
            yield


def gated(p: Organs, cond: Any) -> AbstractContextManager[None]:
    """The adapters that have a gate, at the strength that it gives for each row of ``cond``, in a block."""
    return _scaled(_gates(p, cond))


def _gates(p: Organs, cond: Conditioning) -> list[tuple[Adapter, Float[Tensor, "rows"]]]:
    return [(a, a.gate(cond)) for a in p.adapters.values() if a.gate is not None]


@contextmanager
def _scaled(scales: list[tuple[Adapter, Float[Tensor, "rows"]]]) -> Iterator[None]:
    """The adapters at these scales, one per picture, for the duration of the block."""
    before = [(adapter, adapter.scale) for adapter, _ in scales]
    try:
        for adapter, scale in scales:
            adapter.scale = scale
        yield
    finally:
        for adapter, scale in before:
            adapter.scale = scale


def _step_options(solver, eta: float, generators: list[torch.Generator]) -> dict:
    """The arguments of ``solver.step`` that this solver knows."""
    names = solver.step.__code__.co_varnames[: solver.step.__code__.co_argcount]
    if eta and "eta" not in names:
        raise BadInput(f'{type(solver).__name__} has no eta: use scheduler="ddim"')
    return {k: v for k, v in {"eta": eta, "generator": generators}.items() if k in names}
