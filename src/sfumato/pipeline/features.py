"""Features as a pure function of the latent, and the prediction as one of features: what Jacobians are taken of."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato.errors import BadInput
from sfumato.sample import predict

from .attention import tap
from .conditioning import Conditioning
from .hooks import attach
from .organs import Organs
from .sampling import gated


class _Reached(Exception):
    """The place has run; what comes behind it is not needed."""


def features(
    p: Organs,
    z: Float[Tensor, "batch channel height width"],
    t: Float[Tensor, "..."] | float,
    cond: Conditioning,
    where: str = "bottleneck",
) -> Float[Tensor, "batch *features"]:
    """See `Text2Image.features`."""
    place = p.network.get_submodule(p.anatomy.place(where))
    found: list[Any] = []

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(output)
        raise _Reached

    handle = attach(place, stop)
    rows = _rows(cond, len(z))
    try:
        # The fused kernels of attention have no derivative in forward mode.
        with gated(p, rows), sdpa_kernel(SDPBackend.MATH):
            p.denoiser(z, t, cond)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not found:
        raise BadInput(f"the network does not run through {where!r} in this call: choose another place")
    value = found[0]
    return (value if torch.is_tensor(value) else value[-1]).to(z.dtype)


def continued(
    p: Organs,
    h: Float[Tensor, "batch *features"],
    z: Float[Tensor, "channel height width"],
    t: Float[Tensor, "..."] | float,
    cond: Conditioning,
    where: str = "bottleneck",
) -> Float[Tensor, "batch channel height width"]:
    """See `Text2Image.continued`."""
    rows = _rows(cond, len(h))
    swap = lambda out: h.to(out) if torch.is_tensor(out) else (*out[:-1], h.to(out[-1]))
    with gated(p, rows), tap(p, where, swap), sdpa_kernel(SDPBackend.MATH):
        return predict(p.denoiser, z.expand(len(h), *z.shape), t, rows, "eps")


def _rows(cond: Conditioning, n: int) -> Conditioning:
    return cond if len(cond) == n else cond.map(lambda x: x.expand(n, *x.shape[1:]))
