"""Sampling from a text-to-image pipeline: one loop over a fresh diffusers scheduler, one seed a picture.

A picture depends on its prompt, its seed and the settings; never on the batch it was computed in, because all
its randomness comes from a CPU generator of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from sfumato import catalog
from sfumato.errors import BadInput
from sfumato.progress import console
from sfumato.sample.guidance import Guided
from sfumato.sample.schedulers import check_steps

from .conditioning import Conditioning
from .steering import following

if TYPE_CHECKING:
    from .adapter import Adapter
    from .base import Text2Image


class Rule(Protocol):
    """A sampler with settings that also comes as a scheduler, such as `sfumato.sample.S2N`."""

    def scheduler(self, config: Any) -> SchedulerMixin:
        """The scheduler with the noise table of another one's ``config``."""
        ...


Scheduler: TypeAlias = str | SchedulerMixin | Rule | None


def make_scheduler(p: Text2Image, scheduler: Scheduler = None):
    """A fresh scheduler with the checkpoint's noise process (by a name that its `Clock` knows, a sampler of the
    catalogue by its name or with settings), a copy of another, or its own.

    Raises:
        BadInput: unknown name, or a scheduler of another kind of process.
    """
    made = _make_scheduler(p, scheduler)
    p.clock.check(made)
    return made


def _make_scheduler(p: Text2Image, scheduler: Scheduler):
    config, named = p.pipe.scheduler.config, p.clock.solvers
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
    return type(chosen).from_config(chosen.config)


@torch.no_grad()
def draw(
    p: Text2Image,
    prompts: str | Sequence[str] | None,
    seeds: int | Sequence[int],
    *,
    sampling_steps: int | None = None,
    cfg_scale: float | None = None,
    negative: str | Conditioning | None = None,
    scheduler: Scheduler = None,
    eta: float = 0.0,
    size: int | None = None,
    batch: int = 32,
    cond: Conditioning | None = None,
    cfg_interval: tuple[float, float] | None = None,
    progress: bool = False,
) -> Float[Tensor, "n 3 height width"]:
    """One picture in [0, 1] per (prompt, seed), on the CPU, in float32.

    Args:
        prompts: texts; one text goes with every seed. None if ``cond`` is given.
        seeds: one per picture; one seed goes with every text.
        sampling_steps: denoising steps. Default: the number that the pipeline was distilled for, else 25.
        cfg_scale: guidance, u + cfg_scale (c - u); 1 is none. Default: the pipeline's.
        negative: what guidance steers away from; None is what the pipeline itself takes when none is given.
        scheduler: "ddim", "addim", "dpm++", a sampler of the catalogue ("s2n", or ``S2N(rho=0.3)``), a diffusers
            scheduler (its class and settings), or None for the pipeline's.
        eta: 0 is deterministic, 1 ancestral; for schedulers that know it (DDIM).
        size: side in pixels; default the model's.
        batch: pictures computed together; changes memory and speed only.
        cond: encoded prompts instead of ``prompts``; one row goes with every seed.
        cfg_interval: (low, high): guide only at times in it.
        progress: show a bar.

    Raises:
        BadInput: numbers of prompts and seeds that do not match, a size, scheduler or step count that cannot
            be.
    """
    if batch < 1:
        raise BadInput(f"batch must be at least 1, got {batch}")
    jobs = _Jobs.make(p, prompts if cond is None else cond, seeds, negative, size)
    sampling_steps = p.defaults.get("sampling_steps", 25) if sampling_steps is None else sampling_steps
    starts = range(0, len(jobs.seeds), batch)
    pictures = []
    with _bar(progress, len(starts) * sampling_steps) as advance:
        for start in starts:
            chunk = slice(start, start + batch)
            z, _ = _last(_states(p, jobs, chunk, sampling_steps, cfg_scale, scheduler, eta, cfg_interval, advance))
            x = p.decode_latents(z)
            pictures.append(((x.float() + 1) / 2).clamp(0, 1).cpu())
    return torch.cat(pictures)


@torch.no_grad()
def trajectory(
    p: Text2Image,
    prompts: str | Sequence[str] | Conditioning,
    seeds: int | Sequence[int],
    *,
    sampling_steps: int,
    stop_after: int,
    cfg_scale: float | None = None,
    negative: str | Conditioning | None = None,
    scheduler: Scheduler = "ddim",
    eta: float = 0.0,
    size: int | None = None,
    cfg_interval: tuple[float, float] | None = None,
) -> tuple[Float[Tensor, "n channel h w"], float]:
    """The noisy latent (alpha x + sigma eps) after ``stop_after`` of ``sampling_steps`` steps, and its time in [0, 1].

    ``stop_after`` 0 gives pure noise at the first timestep; ``sampling_steps`` gives the clean latent at time 0. All
    pictures are computed in one batch. Other arguments as in `draw`.

    Raises:
        BadInput: as `draw`; ``stop_after`` outside [0, sampling_steps].
    """
    if not 0 <= stop_after <= sampling_steps:
        raise BadInput(f"stop_after must lie between 0 and sampling_steps = {sampling_steps}, got {stop_after}")
    jobs = _Jobs.make(p, prompts, seeds, negative, size)
    states = _states(p, jobs, slice(None), sampling_steps, cfg_scale, scheduler, eta, cfg_interval)
    # Some schedulers evaluate the network more than once a step: the end is the last state, however numbered.
    return _last(states) if stop_after == sampling_steps else _last(islice(states, stop_after + 1))


@torch.no_grad()
def states(
    p: Text2Image,
    prompts: str | Sequence[str] | Conditioning,
    seeds: int | Sequence[int],
    *,
    sampling_steps: int,
    cfg_scale: float | None = None,
    negative: str | Conditioning | None = None,
    scheduler: Scheduler = "ddim",
    eta: float = 0.0,
    size: int | None = None,
    cfg_interval: tuple[float, float] | None = None,
) -> Iterator[tuple[Float[Tensor, "n channel h w"], float]]:
    """All that `trajectory` passes through: (latent, time) from pure noise to clean, ``sampling_steps`` + 1 of them."""
    jobs = _Jobs.make(p, prompts, seeds, negative, size)
    yield from _states(p, jobs, slice(None), sampling_steps, cfg_scale, scheduler, eta, cfg_interval)


def _last(states: Iterator) -> tuple[Tensor, float]:
    return deque(states, maxlen=1).pop()


@dataclass(frozen=True)
class _Jobs:
    """What to draw: one prompt (or row of a conditioning) and one seed per picture."""

    prompts: list[str] | Conditioning
    seeds: list[int]
    negative: str | Conditioning | None
    size: int | None

    @classmethod
    def make(cls, p, prompts, seeds, negative, size) -> _Jobs:
        p.latent_shape(size)
        if prompts is None:
            raise BadInput("nothing to draw: give prompts, or an encoded conditioning")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        seeds = [int(seeds)] if isinstance(seeds, int) else [int(s) for s in seeds]
        n = max(len(prompts), len(seeds))
        if n == 0 or {len(prompts), len(seeds)} - {1, n}:
            raise BadInput(
                f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed per prompt, or one of either"
            )
        if len(prompts) < n:
            prompts = prompts.repeat(n) if isinstance(prompts, Conditioning) else list(prompts) * n
        if isinstance(negative, Conditioning) and len(negative) not in (1, n):
            raise BadInput(
                f"{len(negative)} negative conditionings for {n} pictures: give one, or one for each"
            )
        return cls(prompts, seeds * n if len(seeds) < n else seeds, negative, size)

    def conditioning(
        self, p: Text2Image, chunk: slice, guided: bool
    ) -> tuple[Conditioning, Conditioning | None]:
        """The conditioning and, if guided, what guidance steers away from, for some of the pictures."""
        rows = self.prompts[chunk]
        if not isinstance(rows, Conditioning):
            distinct = list(dict.fromkeys(rows))
            rows = p.encode(distinct, size=self.size)[[distinct.index(r) for r in rows]]
        if not guided:
            return rows, None
        if isinstance(self.negative, Conditioning) and len(self.negative) > 1:
            return rows, self.negative[chunk]
        return rows, p.unconditional(len(rows), self.negative, self.size)


def _states(
    p: Text2Image,
    jobs: _Jobs,
    chunk: slice,
    sampling_steps: int,
    cfg_scale: float | None,
    scheduler: Scheduler,
    eta: float,
    cfg_interval: tuple[float, float] | None,
    advance=lambda: None,
) -> Iterator[tuple[Float[Tensor, "n channel h w"], float]]:
    """The latents from pure noise to clean, each with its time: sampling_steps + 1 states."""
    T = p.denoiser.timesteps
    if not 1 <= sampling_steps <= T:
        raise BadInput(f"sampling_steps must lie between 1 and {T}, this model's timesteps: got {sampling_steps}")
    check_steps(sampling_steps, p.pipe.scheduler.config.get("distilled_steps"))
    cfg_scale = p.defaults["cfg_scale"] if cfg_scale is None else cfg_scale
    if not math.isfinite(cfg_scale):
        raise BadInput(f"guidance must be a finite number, got cfg_scale={cfg_scale}")
    cond, negative = jobs.conditioning(p, chunk, guided=cfg_scale != 1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in jobs.seeds[chunk]]
    solver = make_scheduler(p, scheduler)
    options = _step_options(solver, eta, generators)
    shape = p.latent_shape(jobs.size)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    denoiser = Guided(p.denoiser, cond, negative, cfg_scale, cfg_interval)
    scales = [(a, a.gate(cond)) for a in p.adapters.values() if a.gate is not None]
    with following(p, solver) as attend:
        p.clock.begin(solver, sampling_steps, shape, p.device)
        z = p.clock.start(solver, noise.to(p.device))
        for timestep in solver.timesteps:
            x, t = p.clock.scaled(solver, z, timestep), p.clock.time(timestep)
            yield x, t
            with _scaled(scales), attend():
                pred = denoiser(x, t)
            z = solver.step(pred, timestep, z, **options, return_dict=False)[0]
            advance()
    yield z, 0.0


def gated(p: Text2Image, cond: Conditioning) -> AbstractContextManager[None]:
    """The adapters that have a gate, at the strength that it gives for each row of ``cond``, in a block."""
    return _scaled([(a, a.gate(cond)) for a in p.adapters.values() if a.gate is not None])


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


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], None]]:
    """A rich progress bar, or nothing; gives the function that advances it by one."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(transient=True, console=console()) as progress:
        task = progress.add_task("drawing", total=total)
        yield lambda: progress.advance(task)
