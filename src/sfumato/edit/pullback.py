"""Diffusion pullback: directions of the latent that change the bottleneck's features most (arXiv:2307.12868)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Share
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.sampling import gated
from sfumato.sample import predict

from .base import Figure, Given
from .parts.directions import read_directions, require_shape
from .parts.geometry import (
    Basis,
    Map,
    geodesic_distance,
    local_basis,
    mean_frequency,
    power_spectrum,
    stops_of,
    transported,
)  # fmt: skip
from .parts.tangents import tangents, told_apart
from .parts.traversal import Moved, Start, Traversal

__all__ = [
    "Basis", "Pullback", "geodesic_distance", "local_basis", "mean_frequency", "paper_gamma", "power_spectrum",
    "transported", "traversed",
]  # fmt: skip


def paper_gamma(time: float) -> float:
    """gamma of the paper's table for Stable Diffusion: 0.5 from 0.9 T up, 1 at 0.8 T and 0.7 T, 2 from 0.6 T down."""
    return 0.5 if time > 0.85 else 1.0 if time > 0.65 else 2.0


def traversed(
    eps: Callable[[Float[Tensor, "row *dims"]], Float[Tensor, "row *dims"]],
    x: Float[Tensor, "*dims"],
    v: Float[Tensor, "*dims"],
    gamma: float,
    delta: float,
    steps: int,
) -> list[Float[Tensor, "*dims"]]:
    """x <- x + gamma (eps(x + delta v) - eps(x)), so many times; all points, the first included.

    "x-space guidance": a plain step along v leaves the shell of noisy data, and the difference keeps of it what the
    model takes for signal or noise of its own. ``v`` stays the same throughout; a negative ``delta`` goes back.
    """
    points = [x]
    for _ in range(steps):
        here = points[-1]
        moved, still = eps(torch.stack([here + delta * v, here]))
        points.append(here + gamma * (moved - still))
    return points


@dataclass(frozen=True, kw_only=True)
class Pullback(Traversal):
    """Moves the latent along the directions that change the bottleneck's features most (arXiv:2307.12868).

    The Euclidean metric of the middle block's features h, pulled back to the latent, is |v|^2 = v^T J^T J v with
    J = dh/dz: its leading directions are right singular vectors of J, found by subspace iteration without forming J
    (`local_basis`, algorithm 1). The latent of a picture, drawn or inverted, moves along one of them at one ``time``
    (`traversed`) and is drawn to its end without guidance. With an ``edit_prompt``, which J and the steps are told, the
    directions have to do with it.

    ``use`` takes the directions that another run wrote into its folder (of its first picture), carried to this
    picture's tangent space (`transported`): they must be of the same model, place and time; with ``common`` those that
    all its pictures share. With ``half="decoder"`` directions are those that features move the network's noise in, J
    of eps after h with the latent held: of the predicted picture they are the same ones. With ``analyse`` the page
    shows, at several times, how the frequency of the directions rises as noise falls, how far the tangent spaces of
    the pictures are from each other (`geodesic_distance`), and, with ``compare``, those of prompts.

    Cost: for each picture (iterations) x (rank) products with J forward and backward, through half of a U-Net; 2 moves
    rows for each direction and side; and a draw for each stop.

    Differs from the paper: times are those of the pipeline's own grid (the code's is finer than the timesteps at their
    ends, and gives the network fractions of them); prompts may be given where the paper's are empty. Differs from the
    code: signs and spans in the iteration, and the length of u (`local_basis`); the mean of pictures' directions has a
    closed form (`in_common`), where its drafts optimise. The comparison of data sets, which takes several models, is
    not here. In networks without a middle block the middle one of the blocks stands in for it (ours).
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "sampling_steps": 4, "moves": 2, "stops": 1, "iterations": (1, 2), "rank": 2, "gamma": 4.0,
    }  # fmt: skip
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"gamma": 0.0}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "sketch": {"sampling_steps": 50, "delta": 0.25, "oversample": 4},
    }
    """The paper's for Stable Diffusion (the defaults), and one for the embedded model, whose latents are an eighth as
    long."""

    rank: Count = 2
    """Directions that are found together; the paper takes 50 to analyse and to carry them."""
    gamma: NotNegative | None = None
    """Length of a step; by default the paper's for the time: 0.5, 1 or 2, rising as noise falls."""
    delta: NotNegative = 1.0
    """How far along the direction the noise is asked for."""
    moves: Natural | None = None
    """Steps on either side; by default the paper's 16, or 64 with an edit prompt."""
    edit_prompt: str = ""
    """What the Jacobian and the steps are told instead of the picture's prompt."""
    iterations: tuple[Count, Count] = (10, 50)
    """Of the subspace iteration: the least and the most."""
    half: Literal["encoder", "decoder"] = "encoder"
    """Directions of the latent that change features, or those in which features change what is predicted; the second
    runs the whole network for each product."""
    tol: NotNegative = 1e-4
    """It ends when the span moves by less."""
    oversample: Natural = 5
    """Directions iterated beyond the rank and thrown away, which takes fewer iterations."""
    use: Path | None = None
    """A folder of this edit (or its tensors.safetensors), whose directions are used here."""
    common: bool = False
    """Of that folder take what its pictures have in common, not the first one's directions."""
    pinv: bool = False
    """Carry directions by the inverse of the Jacobian, not, as the paper's code, by its directions alone."""
    analyse: tuple[Share, ...] = ()
    """Times at which tangent spaces are compared, of all pictures."""
    compare: tuple[str, ...] = ()
    """Prompts whose tangent spaces are compared at these times, on the first picture's latent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "iterations", tuple(self.iterations))
        if self.iterations[0] > self.iterations[1]:
            raise BadInput(f"the least number of iterations is above the most: {self.iterations[0]}, not up to "
                           f"{self.iterations[1]}")  # fmt: skip
        if self.compare and (len(self.compare) < 2 or not self.analyse):
            raise BadInput("to compare prompts give at least two of them, and times to analyse")
        if self.common and self.use is None:
            raise BadInput("what pictures have in common is read from a folder: name it with use")
        if self.pinv and self.half == "decoder":
            raise BadInput("pinv inverts the way from the latent to its features: with half=decoder there is none")
        stops_of(self._moves, self.stops)

    @property
    def _moves(self) -> int:
        return self.moves if self.moves is not None else 64 if self.edit_prompt else 16

    @property
    def _rank(self) -> int:
        return max(self.rank, max(self.directions) + 1)

    def rows(self, given: Given) -> float:
        passes = self.iterations[1] * 4.0 * (self._rank + self.oversample) / (2 if self.half == "encoder" else 1)
        tracks = len(self.directions) * len(self.signs)
        draws = self.sampling_steps * (1 + self.time * tracks * (self.stops + 1))
        extra = len(self.analyse) * passes * (1 + len(self.compare) / len(given))
        return len(given) * (passes + 2 * tracks * self._moves + draws + extra)

    def basis(self, pipe: Text2Image, z: Float[Tensor, "*latent"], time: float, cond: Conditioning) -> Basis:
        """The local basis at one latent; ``cond`` has one row."""
        f: Map = lambda rows: pipe.features(rows, time, cond, self.where)
        x = z
        if self.half == "decoder":
            f, x = lambda rows: pipe.continued(rows, z, time, cond, self.where), f(z[None])[0]
        settings: dict[str, Any] = {"iterations": self.iterations, "tol": self.tol, "oversample": self.oversample}
        start = torch.Generator().manual_seed(self.seed)
        found = local_basis(f, x, self._rank, start, chunk=self.chunk, **settings)
        return found if self.half == "encoder" else Basis(found.u, found.sigma, found.v)

    def labels(self, pipe: Text2Image, time: float) -> dict[str, str]:
        told = super().labels(pipe, time)
        return told if self.half == "encoder" else {**told, "where": f"{self.where}, as decoded"}

    def prepared(
        self, pipe: Text2Image, time: float, size: int | None = None
    ) -> Float[Tensor, "direction *features"] | None:
        """The directions of `use`."""
        if self.use is None:
            return None
        return read_directions(self.use, "u", self.labels(pipe, time), self.directions, self.common)

    def moved(
        self,
        pipe: Text2Image,
        z: Float[Tensor, "*latent"],
        time: float,
        cond: Conditioning,
        ready: Float[Tensor, "direction *features"] | None,
    ) -> Moved:
        cond = pipe.told(self.edit_prompt, z.shape[-1] * pipe.scale_factor) if self.edit_prompt else cond
        if ready is not None:
            require_shape(ready, pipe.features(z[None], time, cond, self.where)[0])
        basis = self.basis(pipe, z, time, cond)
        v = basis.v[list(self.directions)]
        if ready is not None:
            v = torch.stack([transported(x, basis, self.pinv) for x in ready.to(z)])
        gamma = paper_gamma(time) if self.gamma is None else self.gamma
        kept = stops_of(self._moves, self.stops)
        tracks = []
        with gated(pipe, cond):
            eps = partial(_eps, pipe, time, cond)
            for direction in v:
                sides = {s: traversed(eps, z, direction, gamma, s * self.delta, self._moves) for s in self.signs}
                minus = [sides[-1][i] for i in reversed(kept)] if -1 in sides else []
                plus = [sides[1][i] for i in kept] if 1 in sides else []
                tracks.append(torch.stack([*minus, z, *plus]))
        told = {"sigma": basis.sigma.tolist(), "gamma": gamma, "frequency": mean_frequency(basis.v).tolist()}
        return Moved(torch.stack(tracks), told, {"v": basis.v.cpu(), "u": basis.u.cpu(), "sigma": basis.sigma.cpu()})

    def figures(self, pipe: Text2Image, given: Given, start: Start) -> tuple[tuple[Figure, ...], dict[str, Any]]:
        if not self.analyse:
            return (), {}
        found = tangents(self.basis, pipe, self.states(pipe, start, given.each(given.seeds)), self.analyse, start.cond)
        others = None
        if self.compare:
            states = self.states(pipe, start, given.each(given.seeds))
            said = pipe.told(list(self.compare), start.size)
            others = tangents(self.basis, pipe, states, self.analyse, said, shared=True)
        return told_apart(found, others)


def _eps(
    pipe: Text2Image, time: float, cond: Conditioning, rows: Float[Tensor, "row *latent"]
) -> Float[Tensor, "row *latent"]:
    return predict(pipe.denoiser, rows, time, cond, "eps")
