"""Local times of Rolling Diffusion (arXiv:2402.09470): inside a window each frame has a diffusion time of its own.

A window of W frames begins with n clean ones (context); the W - n others carry noise that grows with their place. One
pass of the global time t from 1 to 0 makes frame n clean; then the window moves on by one frame and a frame of pure
noise enters. Frames are independent given the data, so `GaussianProcess` does all the rest with one time per frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import BadInput
from .schedule import Time, float64

Phase = Literal["rolling", "init", "standard"]


@dataclass(frozen=True)
class Window:
    """``frames`` (W) frames at once, the first ``clean`` (n) of them context.

    Raises:
        BadInput: no frame is left to generate.
    """

    frames: int
    clean: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.clean < self.frames:
            raise BadInput(f"a window of {self.frames} frames cannot begin with {self.clean} clean ones")

    @property
    def noisy(self) -> int:
        """W - n: the frames under way, and the passes that each of them takes."""
        return self.frames - self.clean

    def times(self, phase: Phase, t: Time) -> Float[Tensor, "*t frames"]:
        """The local time of every frame at global time ``t``, in [0, 1], float64.

        With w = 0 ... W-1 and everything clipped to [0, 1]:

        - ``"rolling"``: (w - n + t) / (W - n), section 3.2. Time 0 moved on by one frame is time 1. ``t`` may be any
          number: t - j is pass j seen from a window that stands still.
        - ``"init"``: (w - n) / (W - n) + t, section 3.3: from all noise at t = 1 to the rolling time 0 at t = 0.
          Context has time 0, to which the clip alone would not take it.
        - ``"standard"``: t for all frames but the context, which is ordinary video diffusion.
        """
        return self._unclipped(phase, t).clamp(0, 1)

    def moving(self, phase: Phase, t: Time) -> Bool[Tensor, "*t frames"]:
        """Which frames a small step down from ``t`` changes: those that the bound on the likelihood is about.

        Context never moves, and in the init phase a frame whose turn has not come waits at time 1.
        """
        raw = self._unclipped(phase, t)
        return (raw > 0) & (raw <= 1)

    def _unclipped(self, phase: Phase, t: Time) -> Float[Tensor, "*t frames"]:
        t = float64(t)[..., None]
        place = torch.arange(-self.clean, self.noisy, dtype=torch.float64, device=t.device)
        if phase == "rolling":
            return (place + t) / self.noisy
        if phase not in get_args(Phase):
            raise BadInput(f"unknown phase {phase!r}: use one of {', '.join(get_args(Phase))}")
        start = place / self.noisy if phase == "init" else torch.zeros_like(place)
        return torch.where(place >= 0, start + t, 0.0)


def masks(
    t: Float[Tensor, "*batch frames"], s: Float[Tensor, "*batch frames"]
) -> tuple[Bool[Tensor, "*batch frames"], Bool[Tensor, "*batch frames"], Bool[Tensor, "*batch frames"]]:
    """What a step from local times ``t`` to ``s`` does with each frame: (clean, noise, window), one of them true.

    Clean frames (both times 0) are copied, noise frames (both 1) stay noise, window frames are denoised
    (section 3.1). `GaussianProcess.posterior` does so by itself: where s = t its step is the identity.
    """
    clean, noise = (t == 0) & (s == 0), (t == 1) & (s == 1)
    return clean, noise, ~(clean | noise)
