"""What every model's `draw` shares: who gets which seed and start, a denoiser that has been told, progress."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfumato.errors import BadInput
from sfumato.finite import require_finite_pictures
from sfumato.memory import require_memory
from sfumato.noise import Denoiser, GaussianProcess
from sfumato.noise.process import Prediction
from sfumato.sample.guidance import Guided

from .contract import Condition, Gradient, Guide, Model, Noised, Start, Told

Known = TypeVar("Known", bound=Condition)


@dataclass(frozen=True)
class Rows:
    """The pictures to be drawn: for each what is asked, a seed, and where it starts.

    Attributes:
        asked: one thing a picture, or a condition (for every time) with one row a picture or one for all; None is
            nothing.
        seeds: one a picture.
        start: as for `Model.draw`, with one row a picture.
        negative: what guidance steers away from; a condition has one row a picture, or one for all.
    """

    asked: list[Any] | Told | None
    seeds: list[int]
    start: Start | None = None
    negative: Any = None

    @classmethod
    def make(
        cls,
        model: Model,
        asked: Any,
        seeds: int | Sequence[int],
        cond: Told | None = None,
        start: Start | None = None,
        negative: Any = None,
        size: int | None = None,
    ) -> Rows:
        """Who gets what, with what there is one of given to all.

        Raises:
            BadInput: numbers that do not match, a start of the wrong shape, two things asked at once.
        """
        if asked is not None and cond is not None:
            raise BadInput("give what is asked for or a condition, not both")
        asked = cond if asked is None else asked
        if isinstance(asked, str | int | Path):
            asked = [asked]
        elif torch.is_tensor(asked) or isinstance(asked, Condition):
            asked = model.told(asked)
        seeds = seeds_of(seeds)
        size = None if size is None else whole(size, "size")
        side = model.size if size is None else size
        single = asked is None or callable(asked)
        given = 1 if single else len(asked)
        n = max(given, len(seeds))
        if n == 0 or {given, len(seeds)} - {1, n}:
            raise BadInput(f"{given} things asked for and {len(seeds)} seeds: give one seed for each, or one of either")
        if not single and given < n:
            asked = asked.repeat(n) if isinstance(asked, Condition) else list(asked) * n
        if isinstance(negative, Condition) and len(negative) not in (1, n):
            raise BadInput(f"{len(negative)} negative conditions for {n} pictures: give one, or one for each")
        latent = model.latent_shape(size)
        picture = 12 * side**2  # three float32; a network has at least so many channels of them
        require_memory(2 * n * picture + 16 * picture, f"{n:,} pictures of {side} pixels a side")
        start = _spread(start, n, latent, side)
        return cls(asked, seeds * n if len(seeds) < n else seeds, start, negative)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, chunk: slice) -> Rows:
        asked = self.asked
        if callable(asked):
            asked = lambda t, all_rows=self.asked: _rows(all_rows(t), chunk, len(self))
        elif asked is not None:
            asked = asked[chunk]
        start = self.start
        if isinstance(start, Noised):
            start = replace(start, pictures=start.pictures[chunk])
        elif start is not None:
            start = (start[0][chunk], start[1]) if isinstance(start, tuple) else start[chunk]
        negative = self.negative
        if isinstance(negative, Condition) and len(negative) > 1:
            negative = negative[chunk]
        return Rows(asked, self.seeds[chunk], start, negative)

    def chunks(self, batch: int) -> list[Rows]:
        """The rows in batches.

        Raises:
            BadInput: a batch of less than one.
        """
        if (batch := whole(batch, "batch")) < 1:
            raise BadInput(f"batch must be at least 1, got {batch}")
        return [self[slice(i, i + batch)] for i in range(0, len(self), batch)]

    def told(self, tell: Callable[[list[Any]], Told | None]) -> Told | None:
        """What the denoiser is told, by ``tell`` where it is not yet a condition; equal things are told once."""
        if self.asked is None or callable(self.asked) or isinstance(self.asked, Condition):
            return self.asked
        distinct = list(dict.fromkeys(self.asked))
        told, rows = tell(distinct), [distinct.index(x) for x in self.asked]
        return (lambda t: told(t)[rows]) if callable(told) else told[rows]

    def generators(self) -> list[torch.Generator]:
        """A CPU generator for each picture."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


def whole(value: Any, what: str) -> int:
    """``value`` as an int, if it is a whole number of some kind (numpy's and torch's are); else `BadInput`."""
    try:
        return operator.index(value)
    except TypeError:
        raise BadInput(f"{what} must be a whole number, got {value!r}") from None


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """The seeds, of which there may be one without a list.

    Raises:
        BadInput: one that is no whole number, or that no generator takes.
    """
    several = isinstance(seeds, Iterable) and getattr(seeds, "ndim", 1) > 0
    found = [whole(seed, "a seed") for seed in (seeds if several else [seeds])]
    if wrong := [seed for seed in found if not -(2**63) <= seed < 2**64]:
        raise BadInput(f"a seed must lie between 0 and 2^64 - 1, got {wrong[0]}")
    return found


def right_kind(asked: Any, kind: type[Known], what: str) -> Known | None:
    """``asked`` where it is a condition of this ``kind`` already, else None.

    Raises:
        BadInput: it is a condition of another kind, or files of pictures, which a model that sees some reads itself.
    """
    if isinstance(asked, Condition) and not isinstance(asked, kind):
        raise BadInput(f"this model is told {what}, not {type(asked).__name__}")
    if any(isinstance(x, Path) for x in (asked if isinstance(asked, list | tuple) else [asked])):
        raise BadInput(f"this model is told {what}, not pictures: leave the pictures out")
    return asked if isinstance(asked, kind) else None


def noise(generators: list[torch.Generator], shape: Sequence[int]) -> Float[Tensor, "n *shape"]:
    """Standard normal noise, each picture's from its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def _rows(cond: Condition, chunk: slice, n: int) -> Condition:
    if len(cond) not in (1, n):
        raise BadInput(f"{len(cond)} conditions for {n} pictures: the function must give one, or one for each")
    return (cond.repeat(n) if len(cond) < n else cond)[chunk]


def _spread(start: Start | None, n: int, latent: Sequence[int], size: int) -> Start | None:
    """``start`` with one row for each of ``n`` pictures."""
    if start is None:
        return None
    pictures = isinstance(start, Noised)
    x: Any = start.pictures if pictures else start[0] if isinstance(start, tuple) else start
    fits = tuple(x.shape[-2:]) == (size, size) if pictures else tuple(x.shape[1:]) == tuple(latent)
    if not fits or len(x) not in (1, n):
        due = f"{size} x {size} pictures" if pictures else f"latents of shape {tuple(latent)}"
        raise BadInput(f"a start of shape {tuple(x.shape)}: for {n} pictures give one or {n} {due}")
    x = x.expand(n, *x.shape[1:])
    if isinstance(start, Noised):
        return replace(start, pictures=x)
    return (x, start[1]) if isinstance(start, tuple) else x


@dataclass(frozen=True, eq=False)
class ToldDenoiser:
    """A denoiser that has been told what to draw, with guidance, and with what the caller changes in its predictions.

    Attributes:
        cond: what it is told, for every time if it is a function; None is nothing, without guidance.
        empty: what tells it nothing; None for a model that is never told anything.
        scale: guidance.
        interval: the noise levels, in ``measure``, at which there is guidance; None is all.
        guide: see `Model.draw`.
        around: a context to be in while the denoiser is called with this condition.
        rescale: what the guided and the conditional prediction become, for models whose guidance keeps a norm.
        again: compute each call once more in the backward pass instead of keeping what it needs.
    """

    denoiser: Denoiser
    cond: Told | None
    empty: Condition | None
    scale: float = 1.0
    interval: tuple[float, float] | None = None
    measure: Literal["t", "logsnr"] = "t"
    guide: Guide | None = None
    around: Callable[[Condition | None], AbstractContextManager] = nullcontext
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None
    again: bool = False

    @property
    def process(self) -> GaussianProcess:
        return self.denoiser.process

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    def __call__(self, z: Float[Tensor, "batch *dims"], t: Tensor | float, cond: Any = None) -> Tensor:
        """The prediction for ``z`` at ``t``; ``cond`` is not listened to."""
        cond = self.cond(float(t)) if callable(self.cond) else self.cond
        time = t if torch.is_tensor(t) and t.numel() > 1 else float(t)  # frames have a time each
        pred = checkpoint(self._predict, z, t, cond, use_reentrant=False) if self.again else self._predict(z, t, cond)
        return pred if self.guide is None else self.guide(pred, z, time, cond)

    def _predict(self, z: Tensor, t: Tensor | float, cond: Condition | None) -> Tensor:
        told = self.empty if cond is None else cond
        with self.around(told):
            if cond is None or self.empty is None or not cond.guided_at(self.scale):
                return self.denoiser(z, t, told)
            empty = cond.drop(torch.ones(len(cond), dtype=torch.bool), self.empty)
            return Guided(self.denoiser, cond, empty, self.scale, self.interval, self.measure, self.rescale)(z, t)


def check_guidance(cfg_scale: float) -> float:
    """``cfg_scale``, if it is a finite number; else `BadInput`."""
    if not math.isfinite(cfg_scale):
        raise BadInput(f"guidance must be a finite number, got cfg_scale={cfg_scale}")
    return cfg_scale


def check_interval(interval: tuple[float, float] | None) -> None:
    """Raise `BadInput` for what is no interval (low, high)."""
    if interval and not (len(interval) == 2 and interval[0] <= interval[1]):
        raise BadInput(f"cfg_interval goes from its lower end to its higher, got {tuple(interval)}")


def first_step(strength: float, steps: int, up: bool = False) -> int:
    """At which of so many steps a walk begins of which the share ``strength`` is walked.

    Where steps strength is no whole number, it is rounded down, as diffusers' image-to-image pipelines of Stable
    Diffusion do, or ``up``, as those of flows do.

    Raises:
        BadInput: nothing is left to walk.
    """
    taken = min(steps * strength, steps)
    first = int(steps - taken) if up else steps - int(taken)
    if first >= steps:
        raise BadInput(f"strength {strength} of {steps} steps is less than one step: give more steps or more strength")
    return first


def finished(x: Float[Tensor, "n *dims"], grad: Gradient, seeds: Sequence[int]) -> Float[Tensor, "n *dims"]:
    """Decoded pictures in [0, 1]: where a gradient is wanted as they are, else on the CPU and in float32.

    Raises:
        NotFinite: some of them are not (without ``grad``); it names the seed.
    """
    if grad:
        return ((x + 1) / 2).clamp(0, 1)
    pictures = ((x.float() + 1) / 2).clamp(0, 1).cpu()
    require_finite_pictures(pictures, seeds)
    return pictures
