"""How long the network takes, for plans."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .base import Text2Image


@torch.no_grad()
def seconds_per_row(p: Text2Image, batch: int = 1) -> float:
    """Wall time of one forward pass of the network for one row, measured on ``batch`` rows after a first pass."""
    cond = p.encode([""] * batch)
    z = torch.randn(batch, *p.latent_shape(), generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)
    p.denoiser(z, 0.5, cond)
    start = time.perf_counter()
    float(p.denoiser(z, 0.5, cond).sum())
    return (time.perf_counter() - start) / batch


def peak_memory(pipe: Text2Image) -> int | None:
    """Peak bytes on the GPU that holds ``pipe``, otherwise of this process (not known on Windows)."""
    if pipe.device.type == "cuda":
        return torch.cuda.max_memory_allocated(pipe.device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
