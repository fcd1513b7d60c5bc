"""Back to the manifold of the data: noise on a picture, and a diffusion model that takes it away again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.noise import Denoiser
from sfumato.pipeline.drawing import noise as drawn
from sfumato.sample import ddim, ddpm
from sfumato.sample.schedulers import check_steps
from sfumato.sample.times import uniform
from sfumato.train.draw import step_seed

Sampler = Callable[..., Tensor]


class Projector(Protocol):
    """Pictures in [-1, 1], or a little beyond, to pictures near the manifold.

    ``project(x, t0, rows)``: from time t0 in (0, 1]; ``rows`` names the pictures, whose noise is always the same.
    """

    def __call__(self, x: Float[Tensor, "n *dims"], t0: float, rows: Sequence[int]) -> Float[Tensor, "n *dims"]: ...


def projected(
    denoiser: Denoiser,
    x: Float[Tensor, "n *dims"],
    noise: Float[Tensor, "n *dims"],
    t0: float,
    steps: int,
    sampler: Sampler = ddim,
    cond: Any = None,
    **how: Any,
) -> Float[Tensor, "n *dims"]:
    """x_t0 = alpha x + sigma n, and from there ``steps`` equal steps in time down to 0 (SDEdit, arXiv:2108.01073)."""
    times = uniform(steps, t0)
    return sampler(denoiser, denoiser.process.diffuse(x, times[0], noise), times, cond, **how)


class DiffusionProjector:
    """`projected` with a model of the project that is told nothing.

    Args:
        model: of pictures of one size: an `ImageModel`, or a pipeline that encodes them.
        steps: of denoising.
        ancestral: DDPM's steps, with noise of their own, instead of DDIM's.
        seed: of all noise.
        batch: pictures at a time.
    """

    def __init__(self, model: Any, steps: int, ancestral: bool, seed: int, batch: int):
        check_steps(steps, model.distilled_steps)
        self.model, self.steps, self.seed, self.batch = model, steps, seed, batch
        self.ancestral = ancestral

    def check(self, shape: Sequence[int]) -> None:
        """Raise `BadInput` where the model makes pictures of another shape (channel, height, width)."""
        size, own = self.model.size, getattr(self.model, "shape", None)
        if (own is not None and tuple(own) != tuple(shape)) or tuple(shape[1:]) != (size, size):
            told = "x".join(map(str, own or (3, size, size)))
            raise BadInput(f"the projector makes pictures of {told}, and these have {'x'.join(map(str, shape))}: "
                           "train a projector on pictures such as these")  # fmt: skip

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n *dims"], t0: float, rows: Sequence[int]) -> Float[Tensor, "n *dims"]:
        self.check(x.shape[1:])
        model, parts = self.model, []
        sampler: Sampler = partial(ddpm, final_noise=False) if self.ancestral else ddim
        for first in range(0, len(x), self.batch):
            some = x[first : first + self.batch]
            generators = [torch.Generator().manual_seed(step_seed(self.seed, row)) for row in rows[first:][: len(some)]]
            z = model.encode_image(some.to(model.device))
            n = drawn(generators, z.shape[1:]).to(z)
            how = {"generator": generators} if self.ancestral else {}
            back = projected(
                model.denoiser, z, n, t0, self.steps, sampler, model.unconditional(len(some)), **how
            )  # fmt: skip
            parts.append(model.decode_latents(back).clamp(-1, 1).to(x))
        return torch.cat(parts)
