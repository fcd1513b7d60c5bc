"""What an edit is: a dataclass of settings whose verb is `run`; what it is given, and what it hands back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Seed
from sfumato.pipeline import Text2Image
from sfumato.pipeline.timing import seconds_per_row
from sfumato.plan import Plan
from sfumato.settings import Tuned
from sfumato.text import counted


@dataclass(frozen=True)
class Given:
    """What is to be edited: pictures, or pictures yet to be drawn.

    Attributes:
        prompts: what each picture shows, or what is to be drawn; one for all, or one each.
        seeds: of each picture that is drawn, and of all other noise; one for all, or one each.
        pictures: in [0, 1], squares; None: drawn from the prompts.
    """

    prompts: tuple[str, ...] = ("",)
    seeds: tuple[int, ...] = (0,)
    pictures: Float[Tensor, "n 3 side side"] | None = None

    def __post_init__(self) -> None:
        x = self.pictures
        if x is not None and (x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3] or len(x) == 0):
            raise BadInput(f"pictures of shape {tuple(x.shape)} cannot be edited: give squares, (n, 3, side, side)")
        if x is not None and not (x.isfinite().all() and x.min() >= 0 and x.max() <= 1):
            raise BadInput("pictures to be edited must have values in [0, 1]")
        lengths = {len(self.prompts), len(self.seeds), 1 if x is None else len(x)} - {1}
        if len(lengths) > 1 or 0 in lengths:
            told = f"{counted(len(self.prompts), 'prompt')} and {counted(len(self.seeds), 'seed')}"
            told += "" if x is None else f" for {counted(len(x), 'picture')}"
            raise BadInput(f"{told}: give one for each, or one for all")

    def __len__(self) -> int:
        return max(len(self.prompts), len(self.seeds), 1 if self.pictures is None else len(self.pictures))

    def each(self, values: Sequence[Any]) -> list[Any]:
        """One of ``values`` for each picture."""
        return list(values) * (len(self) // len(values))


@dataclass(frozen=True)
class Figure:
    """A small plot for the page: lines of (x, y)."""

    title: str
    across: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Edited:
    """What an edit made.

    Attributes:
        strips: pictures in [0, 1]: for each that was given, tracks (ways to edit it) of stops (how far).
        tracks: what each track is.
        stops: what each stop is, in the order of a slider.
        plain: the number of the stop at which nothing has been edited.
        told: what is to be said of it, for the record (JSON types).
        before: the pictures that were given, if any were.
        maps: by name, what belongs over a picture of the last stop, in [0, 1], such as masks.
        figures: plots.
        tensors: by name, what the folder keeps for later use (``tensors.safetensors``).
        labels: what the file says of them.
    """

    strips: Float[Tensor, "n track stop 3 side side"]
    tracks: tuple[str, ...]
    stops: tuple[str, ...]
    plain: int
    told: dict[str, Any] = field(default_factory=dict)
    before: Float[Tensor, "n 3 side side"] | None = None
    maps: Mapping[str, Float[Tensor, "n height width"]] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Edit(Tuned, ABC):
    """Fields that every edit has. A new one is one file: a subclass that says in `edit` what it does.

    The pipeline is left exactly as it was. A picture's edit depends on the picture, its prompt, its seed and the
    settings, not on its neighbours.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    """Settings with which it takes about a second on a tiny pipeline, for the tests that all edits share."""
    NEUTRAL: ClassVar[Mapping[str, Any]]
    """Settings, on top of these, under which all pictures of a strip are the same, bit for bit."""
    subject: ClassVar[bool] = False
    """Whether the prompt says what is to come into the picture, and not what it shows."""

    seed: Seed = 0
    """Of all randomness in the edit itself; that of drawn pictures is their own."""
    sampling_steps: Count = 50
    """Denoising steps from noise to picture, and of an inversion."""

    def check(self, pipe: Text2Image, given: Given) -> None:
        """Raise `BadInput` if it cannot be done; cheap, before anything is computed."""
        if "marked" in pipe.defaults:  # editors decode latents of their own, past the mark of `draw`
            raise BadInput("pictures of this pipeline are marked as it draws them, and editors do not mark: use draw")
        if given.pictures is not None:
            pipe.latent_shape(given.pictures.shape[-1])

    def rows(self, given: Given) -> float:
        """About how many rows it takes through the network, a backward pass counted as two, for plans."""
        return 2.0 * self.sampling_steps * len(given)

    def plan(self, pipe: Text2Image, given: Given) -> Plan:
        """Memory and time, from one timed pass of the network."""
        rows = self.rows(given)
        weights = sum(p.numel() * p.element_size() for part in pipe.parts().values() for p in part.parameters())
        title = f"{type(self).__name__} of {counted(len(given), 'picture')}: about {rows:,.0f} rows through the network"
        return Plan(title, memory={"weights": weights}, seconds=rows * seconds_per_row(pipe, 2))

    @abstractmethod
    def edit(self, pipe: Text2Image, given: Given, progress: bool = False) -> Edited:
        """The edit itself.

        Raises:
            BadInput: as `check`.
        """

    def run(
        self, pipe: Text2Image, pictures: Float[Tensor, "n 3 side side"], prompts: str | Sequence[str] = ""
    ) -> Float[Tensor, "n stop 3 side side"]:
        """A strip for each picture: all stops of all tracks, one after the other.

        Args:
            pictures: in [0, 1].
            prompts: what each shows, or, where there is a ``subject``, is to show; one for all, or one each.
        """
        asked = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        return self.edit(pipe, Given(asked, (self.seed,), pictures)).strips.flatten(1, 2)


def shown_in(x: Float[Tensor, "n 3 side side"]) -> Float[Tensor, "n 3 side side"]:
    """Decoded pictures in [0, 1], in float32 on the CPU."""
    return ((x.detach().float() + 1) / 2).clamp(0, 1).cpu()


def distance(a: Float[Tensor, "n 3 side side"], b: Float[Tensor, "n 3 side side"]) -> list[float]:
    """Root mean square difference of each pair of pictures in [0, 1]."""
    return (a.cpu().float() - b.cpu().float()).square().flatten(1).mean(1).sqrt().tolist()


@torch.no_grad()
def through_autoencoder(
    pipe: Text2Image, pictures: Float[Tensor, "n 3 side side"]
) -> tuple[Float[Tensor, "n *latent"], list[float]]:
    """The latents of pictures, and by how much these differ when they come back (`distance`)."""
    z = pipe.encode_image(pictures.to(pipe.device, pipe.dtype) * 2 - 1)
    return z, distance(shown_in(pipe.decode_latents(z)), pictures)
