"""A distilled model says how it is sampled, so that whoever runs it need not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sfumato.errors import BadInput
from sfumato.noise import GaussianProcess, RectifiedFlow
from sfumato.sample.schedulers import FewStepScheduler, RectifiedFlowScheduler

from .base import Text2Image
from .clock import FlowClock
from .image import ImageModel

_WIDTH = 256
"""Of the guidance embedding, as guidance-distilled checkpoints have it."""


def own_way(pipe: Text2Image, drawing: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Text2Image.draw` for ``pipe``: one that was distilled to few steps draws in its own way."""
    own = {"sampling_steps": None, "cfg_scale": None, "scheduler": None} if pipe.distilled_steps else {}
    return {**drawing, **own}


def few_steps(model: Any, sampling_steps: int, start: float = 1.0, ancestral: bool = False) -> None:
    """From now on ``model`` samples in S = ``sampling_steps`` DDIM steps t = 1, (S - 1) / S, ... without guidance.

    With a ``start`` below 1 all times are that much smaller, and the noise is that of the first. With ``ancestral`` the
    steps draw from q(z_s | z_t, x0), but for the last.

    Changed in place, and saved with it. A text-to-image pipeline does so by itself, ``pipe(prompt)`` in diffusers too:
    its scheduler becomes a `FewStepScheduler` (a `RectifiedFlowScheduler` stays one), and its network is marked as
    guidance-distilled, which is what makes diffusers skip guidance. The mark is an embedding of the guidance scale with
    all weights zero: the network computes what it computed before. Other numbers of steps are refused.
    """
    if isinstance(model, ImageModel):
        model.defaults |= {
            "scheduler": "ddpm" if ancestral else "ddim", "options": {}, "sampling_steps": sampling_steps,
            "distilled_steps": sampling_steps, "cfg_scale": 1.0, "start_time": start,
        }  # fmt: skip
        return
    check_few_steps(model)
    pipe, network = model.pipe, model.network
    config = pipe.scheduler.config
    own: dict[str, Any] = {"distilled_steps": sampling_steps, "start_time": start, "ancestral": ancestral}
    if isinstance(pipe.scheduler, RectifiedFlowScheduler):
        pipe.scheduler = RectifiedFlowScheduler.from_config(config, **own)
    else:
        pipe.scheduler = FewStepScheduler.from_config(config, **own, clip_sample=config.get("clip_sample", False))
    model.defaults |= {"sampling_steps": sampling_steps, "cfg_scale": 1.0}
    if network.config.get("time_cond_proj_dim") is None:
        embedding = network.time_embedding
        like = embedding.linear_1.weight
        project = nn.Linear(_WIDTH, like.shape[1], bias=False, device=like.device, dtype=like.dtype)
        nn.init.zeros_(project.weight)
        embedding.cond_proj = project.requires_grad_(False)
        network.register_to_config(time_cond_proj_dim=_WIDTH)


def as_flow(model: Any) -> None:
    """From now on the output of ``model``'s network is the flow eps - x0 on straight paths, whatever it was before.

    Changed in place, and saved with it; the weights stay, and are to be trained. A text-to-image pipeline's scheduler
    becomes a `RectifiedFlowScheduler`, also for ``pipe(prompt)`` in diffusers; it has T, the timesteps, of the old one.
    """
    if isinstance(model, ImageModel):
        model.process, model.prediction = GaussianProcess(RectifiedFlow()), "flow"
        model.defaults |= {"scheduler": "ddim", "options": {}, "distilled_steps": None, "start_time": 1.0}
        return
    check_few_steps(model)
    model.pipe.scheduler = RectifiedFlowScheduler(model.clock.timesteps)
    model.clock = FlowClock.of(model.pipe.scheduler)


def check_few_steps(model: Any) -> None:
    """Refuse a model that `few_steps` cannot tell how it draws.

    Raises:
        BadInput: names those that it can.
    """
    if isinstance(model, Text2Image) and not hasattr(model.network, "time_embedding"):
        raise BadInput(
            f"a {type(model.network).__name__} cannot be marked as distilled to few steps: distil pipelines of "
            "Stable Diffusion 1.x/2.x or SDXL, or an ImageModel"
        )


def listens_to_guidance(network: nn.Module) -> bool:
    """Whether the network's output depends on a guidance scale it is told (that of `few_steps` does not)."""
    if network.config.get("time_cond_proj_dim") is None:
        return False
    return bool(torch.count_nonzero(network.time_embedding.cond_proj.weight))

