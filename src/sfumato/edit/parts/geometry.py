"""The geometry that features pull back onto the latent: bases of tangent spaces, transport, distances, spectra.

A map ``f`` takes rows of inputs to rows of features, no row depending on another, such as `Text2Image.features`. Its
Jacobian J at one input is never formed: it is applied to rows, forward (J v), ``chunk`` of them in a pass, and backward
(J^T u). Everything runs in the precision of its input, float64 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.autograd.forward_ad as forward
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

Map: TypeAlias = Callable[[Float[Tensor, "row *dims"]], Float[Tensor, "row *features"]]


@dataclass(frozen=True)
class Basis:
    """The leading singular vectors of a Jacobian: J v_i = sigma_i u_i, all of unit length and orthogonal.

    Attributes:
        v: directions of the input, the one that changes the features most first.
        sigma: by how much.
        u: the directions in which the features then change.
    """

    v: Float[Tensor, "rank *dims"]
    sigma: Float[Tensor, "rank"]
    u: Float[Tensor, "rank *features"]

    def __len__(self) -> int:
        return len(self.sigma)


@torch.no_grad()
def pushed(
    f: Map, x: Float[Tensor, "*dims"], v: Float[Tensor, "row *dims"], chunk: int = 8
) -> Float[Tensor, "row *features"]:
    """J v for each row, by forward-mode differentiation: no graph is kept."""
    found = []
    for part in v.split(chunk):
        with forward.dual_level():
            out = forward.unpack_dual(f(forward.make_dual(_rows(x, len(part)), part.contiguous())))
            found.append(torch.zeros_like(out.primal) if out.tangent is None else out.tangent.clone())
    return torch.cat(found)


def pulled(f: Map, x: Float[Tensor, "*dims"], u: Float[Tensor, "row *features"]) -> Float[Tensor, "row *dims"]:
    """J^T u for each row: one pass forward, whose graph is kept, and a pass back for each row."""
    with torch.enable_grad():
        at = _rows(x, 1).requires_grad_(True)
        out = f(at)
    found = [torch.autograd.grad(out, at, row[None], retain_graph=True, allow_unused=True)[0] for row in u]
    return torch.cat([torch.zeros_like(at.detach()) if grad is None else grad for grad in found])


def local_basis(
    f: Map,
    x: Float[Tensor, "*dims"],
    rank: int,
    generator: torch.Generator,
    *,
    iterations: tuple[int, int] = (10, 50),
    tol: float = 1e-4,
    oversample: int = 0,
    chunk: int = 8,
    start: Float[Tensor, "some *dims"] | None = None,
) -> Basis:
    """The ``rank`` leading singular vectors of the Jacobian of ``f`` at ``x``, by subspace iteration.

    Algorithm 1 of arXiv:2307.12868: V <- right singular vectors of V J^T J, from orthonormal random rows, until they
    stop moving. It ends with one pass forward whose Rayleigh-Ritz step makes J V = diag(sigma) U with V and U
    orthonormal exactly, however far the iteration has come, and signs that belong together.

    Differs from the paper's code: its test compares vectors whose signs an SVD is free to flip, so that it never fires,
    and what it returns as u has the previous iteration's sign and length; here spans are compared (the Frobenius norm
    of what the new V has outside of the old), and u is made anew.

    Args:
        rank: at most the dimension of the input and of the features.
        generator: of the random start (CPU).
        iterations: the least and the most.
        tol: the span stands still.
        oversample: that many rows more are iterated and thrown away, which converges faster.
        chunk: rows in one pass forward.
        start: rows to begin with instead of random ones, such as a neighbouring point's basis.

    Cost: an iteration is rank + oversample products forward (about two calls of ``f`` each), one call of
    ``f`` and as many passes backward.

    Raises:
        BadInput: a rank that the map cannot have.
    """
    size = x.numel()
    if not 1 <= rank <= size:
        raise BadInput(f"a basis at a point of {size} dimensions has a rank between 1 and {size}, got {rank}")
    rows = min(rank + oversample, size)
    random = torch.randn(rows, size, generator=generator, dtype=torch.float64).to(x)
    if start is not None:
        random[: len(start)] = start.flatten(1)[:rows]
    v = _orthonormal(random)
    for i in range(iterations[1]):
        u = pushed(f, x, v.reshape(rows, *x.shape), chunk)
        w = pulled(f, x, u).flatten(1)
        _, _, new = torch.linalg.svd(w, full_matrices=False)
        kept = new[:rank]
        moved = (kept - kept @ v[:rank].T @ v[:rank]).norm()
        v = _signed(new, v)
        if i + 1 >= iterations[0] and moved < tol:
            break
    u = pushed(f, x, v.reshape(rows, *x.shape), chunk)
    left, sigma, right = torch.linalg.svd(u.flatten(1), full_matrices=False)
    if len(sigma) < rank:
        raise BadInput(f"these features have {len(sigma)} dimensions: ask for a rank up to that, not {rank}")
    turned = left.T @ v  # rows: the Ritz vectors
    signs = _signs(turned, v[: len(turned)])
    turned, right = signs * turned, signs * right
    return Basis(turned[:rank].reshape(rank, *x.shape), sigma[:rank], right[:rank].reshape(rank, *u.shape[1:]))


def dense_basis(f: Map, x: Float[Tensor, "*dims"], rank: int) -> Basis:
    """The same from the whole Jacobian, by as many backward products as there are features: for few of them.

    Raises:
        BadInput: a rank that the map cannot have.
    """
    with torch.no_grad():
        out = f(x[None])[0]
    if not 1 <= rank <= min(x.numel(), out.numel()):
        most = min(x.numel(), out.numel())
        raise BadInput(f"features of {out.numel()} dimensions have a basis of rank 1 to {most}, got {rank}")
    eye = torch.eye(out.numel(), dtype=x.dtype, device=x.device).view(-1, *out.shape)
    u, sigma, v = torch.linalg.svd(pulled(f, x, eye).flatten(1), full_matrices=False)
    signs = fixed_signs(v)
    v, u = signs * v, signs * u.T
    return Basis(v[:rank].reshape(rank, *x.shape), sigma[:rank], u[:rank].reshape(rank, *out.shape))


def transported(u: Float[Tensor, "*features"], basis: Basis, pinv: bool = False) -> Float[Tensor, "*dims"]:
    """A direction of the features as one of the input at another point, whose basis this is; of unit length.

    V^T U u, as the paper's code has it; with ``pinv`` V^T Sigma^-1 U u, the direction whose J v is the orthogonal
    projection of u onto the tangent space (`unit` takes care of the length). At the point that u = u_i comes from, both
    are v_i.
    """
    parts = basis.u.flatten(1) @ u.flatten()
    parts = parts / basis.sigma if pinv else parts
    return unit(torch.tensordot(parts, basis.v, dims=1))


def projected(u: Float[Tensor, "*features"], basis: Basis) -> Float[Tensor, "*features"]:
    """What of u lies in the tangent space in the features, U^T U u, again of unit length."""
    return unit(torch.tensordot(basis.u.flatten(1) @ u.flatten(), basis.u, dims=1))


def unit(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """x / |x|."""
    return x / x.norm()


def geodesic_distance(a: Float[Tensor, "rank *dims"], b: Float[Tensor, "rank *dims"]) -> Float[Tensor, ""]:
    """sqrt(sum theta_j^2) of the principal angles between the spans of two sets of orthonormal rows.

    0 for the same span, sqrt(rank) pi / 2 for orthogonal ones. Angles come from sines and cosines together, since
    neither is exact everywhere.
    """
    a, b = a.flatten(1), b.flatten(1)
    overlap = b @ a.T
    cos = torch.linalg.svdvals(overlap).clamp(max=1)
    sin = torch.linalg.svdvals(b - overlap @ a).flip(0)[: len(cos)].clamp(max=1)
    return torch.atan2(sin, cos).square().sum().sqrt()


def power_spectrum(v: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row band"]:
    """The share of a picture's power in each band of spatial frequency, radially averaged over channels.

    Band k holds the frequencies of k to k + 1 cycles a side (rounded), up to half the side's length; what lies beyond
    in the corners counts to the last.
    """
    power = torch.fft.fft2(v).abs().square().sum(1)
    height, width = v.shape[-2:]
    fy = torch.fft.fftfreq(height, 1 / height, dtype=power.dtype, device=v.device)
    fx = torch.fft.fftfreq(width, 1 / width, dtype=power.dtype, device=v.device)
    radius = (fy[:, None] ** 2 + fx[None] ** 2).sqrt().round().long().clamp(max=min(height, width) // 2)
    bands = power.new_zeros(len(v), min(height, width) // 2 + 1)
    bands.index_add_(1, radius.flatten(), power.flatten(1))
    return bands / bands.sum(1, keepdim=True)


def mean_frequency(v: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row"]:
    """The mean spatial frequency of each, weighted by power, as a share of the highest (half the side's length)."""
    bands = power_spectrum(v)
    number = torch.arange(bands.shape[1], dtype=bands.dtype, device=bands.device)
    return (bands * number).sum(1) / max(1, bands.shape[1] - 1)


def _rows(x: Float[Tensor, "*dims"], n: int) -> Float[Tensor, "row *dims"]:
    # In one layout whatever that of x: norms have no derivative in forward mode where the channels come last.
    return x.detach().expand(n, *x.shape).clone(memory_format=torch.contiguous_format)


def _orthonormal(rows: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
    q, r = torch.linalg.qr(rows.T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)).T.contiguous()


def fixed_signs(v: Float[Tensor, "row dim"]) -> Float[Tensor, "row 1"]:
    """What makes the largest entry of each row positive: an SVD is free to choose signs."""
    return v.gather(1, v.abs().argmax(1, keepdim=True)).sign()


def _signs(new: Tensor, old: Tensor) -> Float[Tensor, "row 1"]:
    """What turns each row to the side of the old one that it is nearest to."""
    overlap = new @ old.T
    near = overlap.gather(1, overlap.abs().argmax(1, keepdim=True))
    return torch.where(near < 0, -1.0, 1.0).to(new)


def _signed(new: Tensor, old: Tensor) -> Tensor:
    return _signs(new, old) * new


def stops_of(steps: int, stops: int) -> list[int]:
    """After which of so many steps a picture is kept, for ``stops`` of them, the last one included.

    Raises:
        BadInput: fewer steps than stops.
    """
    if steps < stops:
        raise BadInput(f"{steps} steps cannot be shown in {stops} stops: take more steps, or fewer stops")
    return [math.ceil(steps * (i + 1) / stops) for i in range(stops)]
