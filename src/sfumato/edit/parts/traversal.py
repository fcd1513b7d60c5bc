"""Edits that move a latent once, at one time, and draw from there: where it comes from, where it stops."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, Share
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.progress import bar

from ..base import Edit, Edited, Figure, Given, distance, through_autoencoder


@dataclass(frozen=True)
class Start:
    """Where pictures come from.

    Attributes:
        noise: of a deterministic draw; None: that of the seeds.
        cond: what the denoiser is told on the way there, and from there on.
        errors: for each picture, by how much the draw from its noise misses it, and the autoencoder alone (root mean
            square, of pixels in [0, 1]).
        size: the side of the pictures; None: the pipeline's own.
    """

    noise: Float[Tensor, "n *latent"] | None
    cond: Conditioning
    errors: Mapping[str, list[float]] | None
    size: int | None = None


@dataclass(frozen=True)
class Moved:
    """What became of one picture's latent.

    Attributes:
        latents: for each track, the latents of its stops.
        told: of this picture, for the record.
        tensors: what belongs to it in the file.
    """

    latents: Float[Tensor, "track stop *latent"]
    told: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Traversal(Edit):
    """The latent of a picture at ``time`` is moved along directions, both ways, and drawn to its end.

    A picture that is given is inverted (DDIM, without guidance); one that is not is drawn from its seed. Both by the
    pipeline's deterministic scheduler, whose grid has the time that is nearest to ``time``. Derivatives of a network in
    half precision are noisy, and so are directions found with it: load the pipeline in float32.
    """

    sampling_steps: Count = 100
    """Denoising steps from noise to picture, and of an inversion."""
    time: Share = 0.7
    """When the latent is moved, from 1 (noise: large changes) to 0 (clean: texture)."""
    directions: tuple[Natural, ...] = (0,)
    """Which of the directions, counted from 0, the strongest first; a track each."""
    stops: Count = 4
    """Pictures on the way, on either side."""
    sides: Literal["both", "plus", "minus"] = "both"
    """On which sides of the picture."""
    cfg_scale: float = 1.0
    """Guidance of draws; with a picture that is given, anything but 1 (none) loses it."""
    boost: Share = 0.0
    """Below this time draws add fresh noise, as the papers do below 0.2 in pixel models; 0: nowhere. Not for flows."""
    where: str = "bottleneck"
    """Whose features measure change: the middle block's, or those of a module of the network."""
    chunk: Count = 8
    """Rows in one pass forward of the Jacobian."""

    def __post_init__(self) -> None:
        given = (self.directions,) if isinstance(self.directions, (int, float)) else tuple(self.directions)
        object.__setattr__(self, "directions", given)
        super().__post_init__()
        if not given or len(set(given)) < len(given):
            raise BadInput(f"name each direction once, counted from 0: got {', '.join(map(str, given)) or 'none'}")

    @property
    def signs(self) -> tuple[int, ...]:
        """The sides that are shown."""
        return {"both": (-1, 1), "plus": (1,), "minus": (-1,)}[self.sides]

    @property
    def marks(self) -> tuple[str, ...]:
        """What the stops are called, in the order of a slider."""
        minus = [f"\N{MINUS SIGN}{i}" for i in range(self.stops, 0, -1)] if -1 in self.signs else []
        plus = [f"+{i}" for i in range(1, self.stops + 1)] if 1 in self.signs else []
        return (*minus, "0", *plus)

    def check(self, pipe: Text2Image, given: Given) -> None:
        super().check(pipe, given)
        pipe.anatomy.place(self.where)
        if self.boost and pipe.prediction == "flow":
            raise BadInput("samplers of a flow add no fresh noise: leave boost out")

    def prepared(self, pipe: Text2Image, time: float, size: int | None = None) -> Any:
        """What is the same for all pictures of a size, such as directions of a file; `moved` gets it."""
        return None

    @abstractmethod
    def moved(
        self, pipe: Text2Image, z: Float[Tensor, "*latent"], time: float, cond: Conditioning, ready: Any
    ) -> Moved:
        """One picture's latent at ``time``, moved; ``cond`` has one row. Its stops as in `marks`."""

    def figures(self, pipe: Text2Image, given: Given, start: Start) -> tuple[tuple[Figure, ...], dict[str, Any]]:
        """Plots for the page, and what the record says of them."""
        return (), {}

    def labels(self, pipe: Text2Image, time: float) -> dict[str, str]:
        """What a file of this edit's tensors says, to be told from those of other models and times."""
        told = {"model": pipe.describe()["sha256"], "time": f"{time:.6f}", "where": self.where}
        return {"method": type(self).__name__, **told}

    @torch.no_grad()
    def edit(self, pipe: Text2Image, given: Given, progress: bool = False) -> Edited:
        self.check(pipe, given)
        start = self.start(pipe, given)
        seeds = given.each(given.seeds)
        z, time = at_time(self.states(pipe, start, seeds), self.time)
        with bar("moving", len(given), progress) as advance:
            ready, moves = self.prepared(pipe, time, start.size), []
            for i in range(len(given)):
                moves.append(self.moved(pipe, z[i], time, start.cond[i], ready))
                advance()
        latents = torch.stack([move.latents for move in moves])
        tracks, stops = latents.shape[1:3]
        drawn = {}
        with bar("drawing", tracks * stops, progress) as advance:
            # Stop by stop, so that a stop that equals another gives the same bits.
            for track, stop in [(a, b) for a in range(tracks) for b in range(stops)]:
                at = (latents[:, track, stop].contiguous(), time)
                drawn[track, stop] = self.drawn(pipe, at, start.cond, seeds, start.size)
                advance()
        strips = torch.stack([torch.stack([drawn[a, b] for b in range(stops)], 1) for a in range(tracks)], 1)
        plain = self.marks.index("0")
        errors = {}
        if start.errors is not None and given.pictures is not None:
            errors = {"errors": {"inversion": distance(strips[:, 0, plain], given.pictures), **start.errors}}
        plots, facts = self.figures(pipe, given, start)
        told = {"time": time, "pictures": [dict(move.told) for move in moves], **errors, **facts}
        names = moves[0].tensors
        return Edited(
            strips, tuple(f"direction {i}" for i in self.directions), self.marks, plain, told, given.pictures,
            figures=plots, tensors={name: torch.stack([move.tensors[name] for move in moves]) for name in names},
            labels=self.labels(pipe, time),
        )  # fmt: skip

    @torch.no_grad()
    def start(self, pipe: Text2Image, given: Given) -> Start:
        """Where the pictures come from."""
        told = pipe.told(given.each(given.prompts), None if given.pictures is None else given.pictures.shape[-1])
        if given.pictures is None:
            return Start(None, told, None)
        z, lost = through_autoencoder(pipe, given.pictures)
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # nothing can be decomposed in half precision
        noise = pipe.invert(z, told, self.sampling_steps)
        return Start(noise, told, {"autoencoder": lost}, given.pictures.shape[-1])

    def drawn(
        self,
        pipe: Text2Image,
        at: tuple[Float[Tensor, "n *latent"], float],
        cond: Conditioning,
        seeds: list[int],
        size: int | None = None,
    ) -> Float[Tensor, "n 3 side side"]:
        """Pictures of latents at a time."""
        settings: dict[str, Any] = {"cond": cond, "cfg_scale": self.cfg_scale, "scheduler": "ddim", "size": size}
        settings["sampling_steps"] = self.sampling_steps
        if 0 < self.boost < at[1]:
            at = at_time(pipe.states(None, seeds, start=at, **settings), self.boost)
        return pipe.draw(None, seeds, start=at, eta=1.0 if self.boost else 0.0, **settings)

    def states(self, pipe: Text2Image, start: Start, seeds: list[int]) -> Any:
        """(latent, time) of the draw from noise to picture, as `Text2Image.states`."""
        steps = {"sampling_steps": self.sampling_steps, "cfg_scale": self.cfg_scale}
        return pipe.states(None, seeds, cond=start.cond, start=start.noise, size=start.size, **steps)


def at_time(states: Any, time: float) -> tuple[Float[Tensor, "n *latent"], float]:
    """The state of a draw that is nearest to ``time``, the noisier of two; no later one is computed than it takes."""
    best: tuple[Tensor, float] | None = None
    for z, t in states:
        if t == 0:  # what is clean is not drawn from
            break
        if best is not None and abs(t - time) >= abs(best[1] - time):
            break
        best = (z, t)
    assert best is not None
    return best
