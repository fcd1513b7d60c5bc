"""Semantic directions as geodesics of the pulled-back metric (arXiv:2302.12469)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Share
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.sampling import gated
from sfumato.sample import predict

from .base import Figure, Given
from .parts.directions import read_directions, require_shape
from .parts.geometry import Basis, Map, dense_basis, local_basis, projected, stops_of, transported, unit
from .parts.shooting import (
    Pool,
    by_basis,
    by_gradient,
    lerp,
    matched,
    normalised,
    path_length,
    pooled,
    shared_directions,
    shoot,
    slerp,
)  # fmt: skip
from .parts.traversal import Moved, Start, Traversal, at_time

__all__ = [
    "Riemannian", "by_basis", "by_gradient", "lerp", "matched", "normalised", "path_length", "pooled",
    "shared_directions", "shoot", "slerp",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Riemannian(Traversal):
    """Moves the latent along geodesics of the metric that pooled bottleneck features pull back (arXiv:2302.12469).

    f is the middle block's output, summed over space; the right singular vectors v_i of its Jacobian are directions of
    the latent, u_i = J v_i / s_i those in the features, which are nearly flat where the latent space is not. So an edit
    is a step along v, then u is carried to the new point and turned back into a v there, and so on (`shoot`, section
    3.2). ``carry`` says how: by "gradient", v = unit(J^T u), one backward pass, or by a new basis, v = unit(V S^-1 U^T
    u) with u projected onto its span ("inverse"), or without S ("flat"). What is moved loses contrast, which
    ``normalise`` gives back at every stop (`normalised`, section 3.4).

    With ``samples``, directions are global (section 3.3): those of as many noises at this ``time``, matched and
    averaged (`shared_directions`), then projected onto each picture's tangent space; ``use`` takes the global ones that
    another run wrote into its folder. ``curvedness`` measures, for pictures two by two, how much tangent spaces turn
    along lerp, slerp and a geodesic shot from one towards the other, in ``segments`` (section 4.2).

    Cost: for each picture, as many backward passes as the features have channels, through half of a U-Net, and one more
    for each move of a direction and side; "inverse" and "flat" take the former for each move. A draw for each stop.

    Differs from the paper: reconstructed, since no code was released for it: that contrast is given back at the stops
    and not between moves; whether mean and deviation are of the whole picture (here) or by channel (``per_channel``);
    signs and ties of the matching, which is by the nearest (drafts of its successor assign one to one); how S enters
    the way back ("inverse", which makes J v parallel to the projected u). "gradient", the default, is ours, to spare a
    basis for each move. The lengths are its successor's for Stable Diffusion, and what is drawn below 0.2 T with fresh
    noise in its pixel models is not here unless ``boost`` says so. The rank is cut to what the features have. Where
    there is nothing of the picture in the latent (alpha 0: a flow at time 1) the paper's rule would undo the edit, and
    "shell" stands in.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "sampling_steps": 4, "moves": 2, "stops": 1, "rank": 2, "pool": "none", "iterations": (1, 2), "length": 4.0,
    }  # fmt: skip
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"length": 0.0}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "sketch": {"sampling_steps": 50, "length": 2.0, "rank": 12, "time": 0.9},
    }
    """The paper's (the defaults), and one for the embedded model, whose latents are an eighth as long as Stable
    Diffusion's."""

    time: Share = 1.0
    """When the latent is moved, from 1 (noise: coarse attributes) to 0 (clean: texture)."""
    rank: Count = 50
    """Directions that a tangent space has."""
    length: NotNegative = 8.0
    """How far the latent is moved in all; 4 to 32 for Stable Diffusion, the further the later."""
    moves: Count = 12
    """Steps on either side; 1 is straight."""
    carry: Literal["gradient", "inverse", "flat"] = "gradient"
    """How a direction comes to the next point."""
    pool: Pool = "sum"
    """What is made of the features: their sum over space, averages of squares of 2 x 2, or nothing."""
    normalise: Literal["first-order", "renoise", "shell", "none"] = "first-order"
    """What gives the contrast back: the paper's rule; alpha x0' + sigma eps of the moved latent; the moved latent at
    the length of the one before; nothing."""
    kappa: Decay = 0.99
    """The paper's rule takes the noise to change by this much of the latent."""
    per_channel: bool = False
    """Match mean and deviation in each channel, not in the whole picture."""
    samples: Natural = 0
    """Noises whose directions are averaged into global ones, the paper's about 100; 0: each picture's own."""
    use: Path | None = None
    """A folder of this edit (or its tensors.safetensors), whose global directions are used here."""
    iterations: tuple[Count, Count] = (10, 50)
    """Of the subspace iteration, where features are not summed: the least and the most."""
    curvedness: bool = False
    """Measure how curved the ways between the pictures are, two by two."""
    segments: Count = 30
    """Of a way that is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "iterations", tuple(self.iterations))
        if self.samples and self.use is not None:
            raise BadInput("global directions come from samples or from a file: give one of the two")
        stops_of(self.moves, self.stops)

    def rows(self, given: Given) -> float:
        basis, tracks = 2.0 * 512 / 2, len(self.directions) * len(self.signs)
        moves = self.moves * tracks * (1.0 if self.carry == "gradient" else basis)
        draws = self.sampling_steps * (1 + self.time * tracks * (self.stops + 1))
        ways = 3 * self.segments * basis if self.curvedness else 0.0
        return len(given) * (basis + moves + draws + ways / 2) + self.samples * basis

    def labels(self, pipe: Text2Image, time: float) -> dict[str, str]:
        return {**super().labels(pipe, time), "pool": self.pool}

    def f(self, pipe: Text2Image, time: float, cond: Conditioning) -> Map:
        """The pooled features as a function of the latent."""
        return lambda rows: pooled(pipe.features(rows, time, cond, self.where), self.pool)

    def basis(self, f: Map, z: Float[Tensor, "*latent"]) -> Basis:
        """The local basis at one latent."""
        most = min(f(z[None])[0].numel(), z.numel())
        rank = max(min(self.rank, most), max(self.directions) + 1)
        if self.pool == "sum":
            return dense_basis(f, z, rank)
        start = torch.Generator().manual_seed(self.seed)
        return local_basis(f, z, rank, start, iterations=self.iterations, oversample=5, chunk=self.chunk)

    def prepared(
        self, pipe: Text2Image, time: float, size: int | None = None
    ) -> tuple[Tensor, list[float]] | None:
        """Global directions, those of a file or of `samples` noises, and how much the samples agree on each."""
        if self.use is not None:
            return read_directions(self.use, "u", self.labels(pipe, time)), []
        if not self.samples:
            return None
        told = pipe.unconditional(self.samples, size=size)
        seeds = [(self.seed + 1 + i) % 2**63 for i in range(self.samples)]
        z, at = at_time(self.states(pipe, Start(None, told, None, size), seeds), time)
        f = self.f(pipe, at, told[0])
        found, alike = shared_directions([self.basis(f, x).u for x in z])
        return found, alike.tolist()

    def moved(
        self,
        pipe: Text2Image,
        z: Float[Tensor, "*latent"],
        time: float,
        cond: Conditioning,
        ready: tuple[Tensor, list[float]] | None,
    ) -> Moved:
        f, wanted = self.f(pipe, time, cond), list(self.directions)
        if ready is not None:
            require_shape(ready[0], f(z[None])[0])
        basis = self.basis(f, z)
        u, v, kept = basis.u[wanted], basis.v[wanted], basis.u
        told: dict[str, Any] = {}
        if ready is not None:
            kept, told["agreement"] = ready
            if max(wanted) >= len(kept):
                raise BadInput(f"there are {len(kept)} directions, counted from 0: there is no {max(wanted)}")
            u = torch.stack([projected(x, basis) for x in kept.to(z)[wanted]])
            # As they will be carried: u is none of this picture's singular vectors, and v would turn at the first move.
            if self.carry == "gradient":
                v = torch.stack([by_gradient(f, z, x)[1] for x in u])
            else:
                v = torch.stack([transported(x, basis, pinv=self.carry == "inverse") for x in u])
        told |= {"sigma": basis.sigma.tolist()}
        tracks = []
        with gated(pipe, cond):
            settle = partial(self._settled, pipe, z, time, cond)
            for i in range(len(wanted)):
                sides = {s: self._shot(f, z, s * u[i], s * v[i]) for s in self.signs}
                minus = [settle(x) for x in reversed(sides.get(-1, []))]
                tracks.append(torch.stack([*minus, settle(z), *(settle(x) for x in sides.get(1, []))]))
        return Moved(torch.stack(tracks), told, {"u": kept.cpu(), "v": basis.v.cpu(), "sigma": basis.sigma.cpu()})

    def _shot(self, f: Map, z: Tensor, u: Tensor, v: Tensor) -> list[Tensor]:
        """The stops of one side."""
        points = shoot(z, u, v, self.length / self.moves, self.moves, partial(self._carried, f))
        return [points[i] for i in stops_of(self.moves, self.stops)]

    def _carried(self, f: Map, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        if self.carry == "gradient":
            return by_gradient(f, x, u)
        return by_basis(self.basis(f, x), u, flat=self.carry == "flat")

    def _settled(self, pipe: Text2Image, z: Tensor, time: float, cond: Conditioning, moved: Tensor) -> Tensor:
        """A moved latent with its contrast given back."""
        if self.normalise == "none":
            return moved
        clean = lambda rows: predict(pipe.denoiser, rows, time, cond, "x0")
        alpha, sigma = (float(x) for x in pipe.process.alpha_sigma(time))
        if self.normalise == "shell" or alpha < 1e-3:
            return moved * (z.norm() / moved.norm())
        if self.normalise == "first-order":
            return normalised(z, moved, clean, alpha, sigma, self.kappa, self.per_channel)
        x0, eps = pipe.process.split(pipe.denoiser(moved[None], time, cond), moved[None], time, pipe.prediction)
        target = matched(x0[0], clean(z[None])[0], self.per_channel)
        return alpha * target + sigma * eps[0]

    def figures(self, pipe: Text2Image, given: Given, start: Start) -> tuple[tuple[Figure, ...], dict[str, Any]]:
        if not self.curvedness:
            return (), {}
        if len(given) < 2:
            raise BadInput("curvedness is of the way between two pictures: give two or more")
        z, time = at_time(self.states(pipe, start, given.each(given.seeds)), self.time)
        lengths: dict[str, list[list[float]]] = {"lerp": [], "slerp": [], "geodesic": []}
        for i, (a, b) in list(enumerate(pairwise(z)))[::2]:
            if torch.equal(a, b):  # no way at all, along which nothing turns
                for way in lengths.values():
                    way.append([0.0] * self.segments)
                continue
            f = self.f(pipe, time, start.cond[i])
            ways = {"lerp": lerp(a, b, self.segments + 1), "slerp": slerp(a, b, self.segments + 1)}
            v, far = unit(b - a), float((b - a).norm())
            u = unit(f((a + 1e-2 * far * v)[None])[0] - f(a[None])[0])
            ways["geodesic"] = shoot(a, u, v, far / self.segments, self.segments, partial(self._carried, f))
            for name, points in ways.items():
                lengths[name].append(path_length([self.basis(f, x).u for x in points]))
        mean = {name: torch.tensor(rows).mean(0).tolist() for name, rows in lengths.items()}
        told = {name: [sum(row) for row in rows] for name, rows in lengths.items()}
        lines = {name: list(enumerate(values)) for name, values in mean.items()}
        return (Figure("How far the tangent space turns in each segment", "segment", lines),), {"curvedness": told}
