"""`VideoModel`: a network of windows of frames, which it rolls out to sequences of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput, unknown
from sfumato.noise import Window
from sfumato.progress import track
from sfumato.sample import ddim, ddpm, dpmpp_2m, heun, rollout
from sfumato.sample.rolling import Schedule

from .image import ImageModel

# Not those of pictures: a pass ends with frames that are still noise, so its last step draws noise like all others.
SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "heun": heun, "dpm++": dpmpp_2m}


@dataclass(eq=False)
class VideoModel(ImageModel):
    """An `ImageModel` of windows, ``shape`` (frame, channel, height, width); the first ``context`` frames are given.

    Beside those of `ImageModel`, its ``defaults`` say ``context`` (the clean frames that a window begins with),
    ``schedule`` ("rolling" or "standard", as it was trained) and ``sampling_steps`` (network calls for each frame).
    """

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

    @torch.no_grad()
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
        progress: bool = False,
    ) -> Float[Tensor, "n n_frames channel height width"]:
        """The frames after ``context``, one sequence per seed, on the CPU, in the scale of the data.

        A sequence does not depend on the batch it was computed in.

        Args:
            seeds: one per sequence, or one number.
            context: given frames, in the scale of the data; the last ones are used. None for models without context.
            n_frames: default: as many as a window generates.
            sampling_steps, schedule, scheduler: default: the model's; schedulers are "ddpm", "ddim", "heun", "dpm++",
                or any of `sfumato.sample` itself.
            finish: let the last window run out; see `sfumato.sample.rollout`.
            batch: sequences computed together.
            progress: show a bar.

        Raises:
            BadInput: no or too little context, frames of another shape, an unknown scheduler or schedule.
        """
        seeds = [seeds] if isinstance(seeds, int) else list(seeds)
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
        denoiser, parts = self.guided(), []
        for start in track(range(0, len(seeds), batch), "rolling out", progress):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
            given = context[start : start + batch].to(self.device)
            frames = rollout(denoiser, given, n_frames, self.window, sampling_steps, generator=generators, **options)
            parts.append(frames.float().cpu())
        return torch.cat(parts)

    def draw(
        self, asked: Float[Tensor, "n clean channel height width"] | None, seeds: int | Sequence[int], **options: Any
    ) -> Float[Tensor, "n n_frames channel height width"]:
        """What `rollout` returns after the frames ``asked``, as pictures in [0, 1]."""
        if asked is not None and not torch.is_tensor(asked):
            raise BadInput(f"a model of frames goes on from given frames, a tensor: it knows no {asked!r}")
        return ((self.rollout(seeds, asked, **options) + 1) / 2).clamp(0, 1)

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
