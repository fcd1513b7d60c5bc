"""How long the network takes, for plans."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .contract import Model


@torch.no_grad()
def seconds_per_row(p: Model, batch: int = 1) -> float | None:
    """Wall time of one forward pass of the network for one row, measured on ``batch`` rows after a first pass.

    None of a network whose weights were not loaded.
    """
    if any(x.is_meta for x in p.network.parameters()):
        return None
    cond = p.unconditional(batch)
    dtype = next(p.network.parameters()).dtype
    z = torch.randn(batch, *p.latent_shape(), generator=torch.Generator().manual_seed(0)).to(p.device, dtype)
    p.denoiser(z, 0.5, cond)
    start = time.perf_counter()
    float(p.denoiser(z, 0.5, cond).sum())
    return (time.perf_counter() - start) / batch


def peak_memory(pipe: Model) -> int | None:
    """Peak bytes on the GPU that holds ``pipe``, otherwise of this process (not known on Windows)."""
    if pipe.device.type == "cuda":
        return torch.cuda.max_memory_allocated(pipe.device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
