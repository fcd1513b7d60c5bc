"""`VideoModel`: a network of windows of frames, which it rolls out to sequences of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput, unknown
from sfumato.finite import require_finite_pictures
from sfumato.memory import require_memory
from sfumato.noise import Window
from sfumato.progress import track
from sfumato.sample import ddim, ddpm, dpmpp_2m, heun, rollout
from sfumato.sample.rolling import Schedule

from .conditioning import Frames
from .contract import Condition, Gradient, Guide
from .drawing import right_kind, seeds_of
from .image import ImageModel

# Not those of pictures: a pass ends with frames that are still noise, so its last step draws noise like all others.
SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "heun": heun, "dpm++": dpmpp_2m}


@dataclass(eq=False)
class VideoModel(ImageModel):
    """An `ImageModel` of windows, ``shape`` (frame, channel, height, width); the first ``context`` frames are given.

    Beside those of `ImageModel`, its ``defaults`` say ``context`` (the clean frames that a window begins with),
    ``schedule`` ("rolling" or "standard", as it was trained) and ``sampling_steps`` (network calls for each frame).
    """

    drawn_by: ClassVar[tuple[str, str]] = ("frames", "rollout")
    own_defaults: ClassVar[tuple[str, ...]] = ("context", "schedule")

    def __post_init__(self) -> None:
        self.defaults = {"context": 0, "schedule": "rolling", "sampling_steps": 16, **self.defaults}
        super().__post_init__()
        if len(self.shape) != 4:
            raise BadInput(f"a model of frames has samples (frame, channel, height, width), not {self.shape}")
        self.window  # noqa: B018  (raises what is wrong with it)

    @property
    def window(self) -> Window:
        """Its frames, and how many of them are context."""
        return Window(self.shape[0], self.defaults["context"])

    def told(self, asked: Float[Tensor, "n clean channel height width"] | Condition | None) -> Frames | None:
        """Given frames to go on from, in the scale of the data; None for a model without context."""
        if asked is None or (told := right_kind(asked, Frames, "frames")) is not None:
            return None if asked is None else told
        if not torch.is_tensor(asked):
            raise BadInput(f"a model of frames goes on from given frames, a tensor: it knows no {asked!r}")
        return Frames(asked)

    def asked_for(self, pictures: Any, rows: Sequence[int]) -> list[Any]:
        """Refused: pictures do not follow one another."""
        raise BadInput("a model of frames goes on from given frames: pictures do not follow one another")

    def rollout(
        self,
        seeds: int | Sequence[int],
        context: Float[Tensor, "n clean channel height width"] | None = None,
        n_frames: int | None = None,
        *,
        sampling_steps: int | None = None,
        schedule: Schedule | None = None,
        scheduler: str | Callable[..., Tensor] | None = None,
        finish: bool = False,
        batch: int = 64,
        guide: Guide | None = None,
        grad: Gradient = False,
        progress: bool = False,
    ) -> Float[Tensor, "n n_frames channel height width"]:
        """The frames after ``context``, one sequence per seed, on the CPU, in the scale of the data.

        A sequence does not depend on its neighbours in a batch, but for rounding; see `Model.draw`.

        Args:
            seeds: one per sequence, or one number.
            context: given frames, in the scale of the data; the last ones are used. None for models without context.
            n_frames: default: as many as a window generates.
            sampling_steps, schedule, scheduler: default: the model's; schedulers are "ddpm", "ddim", "heun", "dpm++",
                or any of `sfumato.sample` itself.
            finish: let the last window run out; see `sfumato.sample.rollout`.
            batch: sequences computed together.
            guide, grad: as for `Model.draw`; the time that ``guide`` is given has an element for each frame.
            progress: show a bar.

        Raises:
            BadInput: no or too little context, frames of another shape, an unknown scheduler or schedule.
        """
        seeds = seeds_of(seeds)
        context = self._context(context, len(seeds))
        chosen = self.defaults["scheduler"] if scheduler is None else scheduler
        if not callable(chosen) and chosen not in SAMPLERS:
            raise unknown("scheduler", str(chosen), SAMPLERS)
        options: dict[str, Any] = {
            "schedule": self.defaults["schedule"] if schedule is None else schedule,
            "sampler": chosen if callable(chosen) else SAMPLERS[chosen],
            "finish": finish,
        }
        sampling_steps = self.defaults["sampling_steps"] if sampling_steps is None else sampling_steps
        n_frames = self.window.noisy if n_frames is None else n_frames
        need = 4 * len(seeds) * n_frames * prod(self.shape[1:])
        require_memory(need, f"{len(seeds)} sequences of {n_frames:,} frames")
        denoiser, parts = self.guided(guide=guide, grad=grad), []
        with torch.set_grad_enabled(bool(grad)):
            for start in track(range(0, len(seeds), batch), "rolling out", progress):
                options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
                given = context[start : start + batch].to(self.device)
                frames = rollout(denoiser, given, n_frames, self.window, sampling_steps, **options)
                parts.append(frames if grad else frames.float().cpu())
                if not grad:
                    require_finite_pictures(parts[-1], seeds[start : start + batch])
        return torch.cat(parts)

    def draw(
        self,
        asked: Float[Tensor, "n clean channel height width"] | Frames | None,
        seeds: int | Sequence[int],
        *,
        start: None = None,
        cond: Frames | None = None,
        grad: Gradient = False,
        **options: Any,
    ) -> Float[Tensor, "n n_frames channel height width"]:
        """What `rollout` returns after the frames ``asked``, as pictures in [0, 1]; ``options`` are those of `rollout`.

        Raises:
            BadInput: as `rollout`; a start, or frames that change with time: every frame has a time of its own.
        """
        if start is not None or callable(cond):
            raise BadInput("frames begin as noise, each at a time of its own: give the frames to go on from instead")
        given, n = self.told(cond if asked is None else asked), len(seeds_of(seeds))
        if given is not None and len(given) == 1:
            given = given.repeat(n)
        frames = self.rollout(seeds, None if given is None else given.frames, grad=grad, **options)
        return ((frames + 1) / 2).clamp(0, 1)

    def invert(self, z: Tensor, cond: Any, sampling_steps: int) -> Tensor:
        """Refused: there is no one noise that all frames come from."""
        raise BadInput("a rolling window has no one noise to come back to: only models of pictures can be inverted")

    def _context(self, context: Tensor | None, n: int) -> Tensor:
        clean, frame = self.window.clean, self.shape[1:]
        if context is None:
            context = torch.zeros(n, 0, *frame)
        if context.ndim != 5 or context.shape[0] != n or context.shape[1] < clean or context.shape[2:] != frame:
            raise BadInput(
                f"this model goes on from {clean} frames of shape {tuple(frame)}: for {n} sequences give a context "
                f"[{n}, {clean} or more, {', '.join(map(str, frame))}], not {list(context.shape)}"
            )
        return context.float()
