"""What a protection is: a dataclass of settings whose verb is `run`, pictures in and pictures out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Seed, within
from sfumato.finite import require_finite_pictures
from sfumato.pipeline import Text2Image
from sfumato.pipeline.lent import lent, require_finite
from sfumato.progress import bar
from sfumato.settings import Tuned

from .parts.pgd import to_levels

See = Callable[[Tensor], Tensor]
"""A picture's own channels, in [-1, 1], as the three colours that a model sees of it."""


@dataclass(frozen=True, kw_only=True)
class Protection(Tuned, ABC):
    """Fields that every protection has.

    A new one is one file: a subclass that says in `moved` how it moves pictures. What is the same for all is here: what
    may be protected, transparency, the budget in whole levels, and random numbers that belong to a picture, not to its
    neighbours.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    """Settings with which it takes about a second on a tiny pipeline, for the tests that all protections share."""
    NEUTRAL: ClassVar[Mapping[str, Any]]
    """Settings under which it changes nothing."""

    budget: Annotated[int, within(1, 255)] = 16
    """Levels of 255 by which any value of a picture may change."""
    batch: Count = 1
    """Pictures of one size at a time; changes memory and speed, and the last bits."""
    seed: Seed = 0
    """Seed of all randomness; a picture's own numbers come from it and from the picture."""

    def run(
        self,
        pipe: Text2Image | DiffusionPipeline,
        pictures: Float[Tensor, "n channel height width"],
        *,
        progress: bool = False,
        advance: Callable[[], None] | None = None,
    ) -> Float[Tensor, "n channel height width"]:
        """The pictures, protected against what ``pipe`` and its like could make of them. ``pipe`` is left as it was.

        Args:
            pictures: in [0, 1]: grey, grey with alpha, colour, or colour with alpha. Alpha stays as it is; what is
                transparent is seen on white, and what is wholly so stays as it is.
            progress: show a bar.
            advance: called as often as `steps` says, in place of a bar.

        Returns:
            On the CPU, in whole levels of 255, none further than ``budget`` of them from what was given.

        Raises:
            BadInput: pictures of another shape, not in [0, 1] or not finite; a pipeline that cannot protect.
        """
        check_pictures(pictures)
        shown = progress and advance is None
        with lent(pipe) as p, torch.no_grad(), bar("protecting", self.steps(len(pictures)), shown) as moves:
            require_finite(p)
            done = [self._some(p, some, advance or moves) for some in pictures.split(self.batch)]
        return torch.cat(done)

    def _some(self, p: Text2Image, pictures: Tensor, advance: Callable[[], None]) -> Tensor:
        colour, alpha = apart(pictures)
        generators = [torch.Generator().manual_seed(seed_of(x, self.seed)) for x in pictures]
        over = None if alpha is None else alpha.to(p.device)
        moved = self.moved(p, (2 * colour - 1).to(p.device), seen_over(over), generators, advance)
        if moved is None:
            return pictures.clone()
        moved = moved.cpu().double() / 2 + 0.5
        if alpha is not None:  # a random start moves what nobody sees too
            moved = torch.where(alpha == 0, colour.double(), moved)
        safe = to_levels(moved, colour, self.budget)
        return safe if alpha is None else torch.cat([safe, alpha], dim=1)

    def steps(self, pictures: int) -> int:
        """How often `moved` advances for so many pictures."""
        return -(-pictures // self.batch)

    @abstractmethod
    def moved(
        self,
        p: Text2Image,
        x: Float[Tensor, "n colour height width"],
        see: See,
        generators: list[torch.Generator],
        advance: Callable[[], None],
    ) -> Tensor | None:
        """The pictures' colours ``x`` in [-1, 1], moved, within the box or not; None to leave them as they are.

        Args:
            see: the model's view of them, differentiable.
            generators: one a picture, on the CPU.
            advance: to be called as often as `steps` says.
        """


def check_pictures(pictures: Tensor) -> None:
    """Raise `BadInput` for what is no batch of pictures in [0, 1]."""
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 2, 3, 4) or not len(pictures):
        raise BadInput(f"protect pictures shaped (n, channels, height, width), 1 to 4 channels: got {pictures.shape}")
    if not pictures.is_floating_point():
        raise BadInput(f"protect pictures as floating point in [0, 1], not {pictures.dtype}: divide levels by 255")
    require_finite_pictures(pictures)
    if pictures.min() < 0 or pictures.max() > 1:
        raise BadInput(f"pictures lie in [0, 1], and these from {pictures.min():g} to {pictures.max():g}")


def apart(pictures: Float[Tensor, "n channel height width"]) -> tuple[Tensor, Tensor | None]:
    """Colour (or grey) and alpha."""
    if pictures.shape[1] in (2, 4):
        return pictures[:, :-1], pictures[:, -1:]
    return pictures, None


def seen_over(alpha: Float[Tensor, "n 1 height width"] | None) -> See:
    """What a model sees of colours in [-1, 1]: grey as three equal ones, and what ``alpha`` leaves open on white."""

    def see(x: Tensor) -> Tensor:
        x = x if alpha is None else x * alpha.to(x) + (1 - alpha.to(x))
        return x.expand(-1, 3, -1, -1)

    return see


def seed_of(picture: Tensor, seed: int) -> int:
    """A seed that belongs to a picture's 8-bit content, whatever stands beside it."""
    levels = (255 * picture.detach().cpu().double()).round().byte().contiguous()
    told = hashlib.sha256(f"{seed} {tuple(levels.shape)} ".encode() + levels.numpy().tobytes())
    return int(told.hexdigest()[:15], 16)
