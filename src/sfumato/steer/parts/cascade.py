"""Upscaling with the chromatogram's weights, as a cascade of upsample guidance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image
from sfumato.pipeline.anatomy import Call
from sfumato.pipeline.steering import Forward, Interceptor, Run

from .calls import resized
from .chromatogram import levels_of, shares
from .upsampling import Upsampled


@dataclass(frozen=True, eq=False)
class Weighted(Upsampled):
    """Upsample guidance with the chromatogram's weight: the share of the levels that the small picture has.

    Attributes:
        side: of the large picture.
    """

    side: int = 1

    def weight(self, t: Any) -> Float[Tensor, "..."]:
        levels = levels_of(self.side)
        coarse = torch.tensor([m >= min(self.factors) for m in levels])
        weight = shares(self.process.logsnr(t), levels)[coarse].sum(0)
        return torch.where(self._target(t) > self._cleanest, 0.0, weight)


class Cascade(Interceptor):
    """Corrects every prediction by that for a picture smaller by a prime factor, itself so corrected, and so on."""

    def __init__(self, p: Text2Image, scale: int, told: dict[str, Any]):
        self.p, self.scale, self.told = p, scale, told
        told["small_runs"] = 0

    def predict(self, forward: Forward, call: Call, run: Run | None) -> Tensor:
        target, trained = call.z.shape[-2:], self.p.latent_shape()[-2:]
        if tuple(target) != tuple(self.scale * side for side in trained):
            side = self.p.size * self.scale
            raise BadInput(f"an upscaling by {self.scale} is for pictures of {side} pixels a side: draw that size")
        return self._corrected(forward, call, self.scale)

    def _corrected(self, forward: Forward, call: Call, left: int) -> Tensor:
        native, pred = self.p.clock.native, forward(call)
        if left == 1:
            return pred
        factor = next(f for f in range(2, left + 1) if left % f == 0)

        def ask(low: Tensor, tau: Tensor) -> Tensor:
            self.told["small_runs"] += 1
            height, width = (side * self.p.scale_factor for side in low.shape[-2:])
            small = resized(call, low, (height, width), (factor, factor))
            number = self.p.clock.number(tau).to(low.device)
            return native(self._corrected(forward, replace(small, timestep=number), left // factor))

        rule = Weighted(self.p.denoiser, (factor, factor), side=call.z.shape[-1])
        time = self.p.clock.time_of(torch.as_tensor(call.timestep).cpu())
        return native(rule.guided(native(pred), call.z, time, ask))
