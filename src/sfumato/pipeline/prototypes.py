"""`PrototypeModel`: an `ImageModel` whose classes are told by their text and by a prototype, a picture of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import atomic_file
from sfumato.foreign import read_tensors

from .conditioning import Labels
from .contract import Condition
from .drawing import right_kind
from .image import ImageModel


@dataclass(frozen=True)
class Prototyped(Condition):
    """A batch of classes.

    Attributes:
        words: the text vectors of each; zeros say nothing.
        prototype: a picture of each, in the scale of the data. It is never dropped: guidance is on the text alone.
    """

    words: Float[Tensor, "batch token width"]
    prototype: Float[Tensor, "batch channel height width"]

    def drop(self, mask: Bool[Tensor, "batch"], empty: Self) -> Self:
        """Other words where ``mask`` is True (of ``empty``: zeros), and the prototype as it is."""
        return self.replace(words=torch.where(mask.to(self.words.device)[:, None, None], empty.words, self.words))


@dataclass(eq=False)
class PrototypeModel(ImageModel):
    """An `ImageModel` of a `sfumato.nets.PrototypeUNet`: ``labels`` are looked up in its tables.

    Told nothing, it has neither text nor prototype (zeros); told a class and guided, it steers away from the same
    prototype without text.
    """

    def told(self, asked: Any) -> Prototyped | None:
        """Classes by name or number, or a condition.

        Raises:
            BadInput: no such class, a condition of another kind.
        """
        if isinstance(asked, Prototyped):
            return asked
        if isinstance(asked, Condition):
            asked = right_kind(asked, Labels, "classes")
        numbers = super().told(asked)
        if asked is None or numbers is None:
            return self.unconditional()
        return self.classes(numbers.numbers)

    def classes(self, numbers: Tensor) -> Prototyped:
        """What the network is told of these classes, differentiable in the prototypes; the number of classes itself is
        no class."""
        network: Any = self.network
        known, place = numbers < len(self.labels), numbers.clamp(max=len(self.labels) - 1)
        words, prototypes = network.words[place], network.prototypes[place]
        if known.all():
            return Prototyped(words, prototypes)
        return Prototyped(words * known[:, None, None], prototypes * known[:, None, None, None])

    def unconditional(self, n: int = 1) -> Prototyped:
        """No text and no prototype, ``n`` times."""
        network: Any = self.network
        return Prototyped(*(x.new_zeros(n, *x.shape[1:]) for x in (network.words, network.prototypes.data)))

    def heard(self, cond: Any, z: Float[Tensor, "batch *dims"]) -> tuple[Tensor, Tensor]:
        cond = cond.repeat(len(z)) if len(cond) == 1 else cond
        return tuple(x.to(z.device, self.network.dtype) for x in (cond.words, cond.prototype))

    def sample(self, labels: Any, n: int, seed: int = 0, **options: Any) -> Float[Tensor, "all 3 height width"]:
        """``n`` pictures in [0, 1] of each of these classes, those of one class side by side; ``options`` of `draw`."""
        cond = self.told(labels)
        cond = self.unconditional() if cond is None else cond
        return self.draw(None, range(seed, seed + n * len(cond)), cond=cond.repeat(n), **options)

    def prototypes(self) -> dict[str, Float[Tensor, "3 height width"]]:
        """The picture of each class, by its name, in [-1, 1] as far as they were not learned."""
        network: Any = self.network
        return {name: network.prototypes[i].detach().cpu().clone() for i, name in enumerate(self.labels)}

    def walk(self, sampling_steps: int) -> Float[Tensor, "steps+1"]:
        """Timesteps k * (T // steps), the largest first, and at last the clean picture."""
        table = getattr(self.process.schedule, "train_steps", 0)
        return leading(sampling_steps, table) if table else super().walk(sampling_steps)


def leading(sampling_steps: int, train_steps: int = 1000) -> Float[Tensor, "steps+1"]:
    """Times of the timesteps k * (train_steps // steps) for k = steps - 1 ... 0, and 0, the clean picture.

    Timestep i is time (i + 1) / train_steps, as `sfumato.noise.schedule.DiscreteSchedule` has it.

    Raises:
        BadInput: more steps than the table has.
    """
    if not 1 <= sampling_steps <= train_steps:
        raise BadInput(f"sampling_steps must lie between 1 and {train_steps}, got {sampling_steps}")
    steps = torch.arange(sampling_steps - 1, -1, -1, dtype=torch.float64) * (train_steps // sampling_steps)
    return torch.cat([(steps + 1) / train_steps, steps.new_zeros(1)])


def save_prototypes(
    file: str | Path, prototypes: dict[str, Float[Tensor, "channel height width"]], overwrite: bool = False
) -> None:
    """Write a table of prototypes, whole or not at all, as safetensors with the classes' names."""
    with atomic_file(file, overwrite) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in prototypes.items()}, temporary)


def load_prototypes(file: str | Path) -> dict[str, Float[Tensor, "channel height width"]]:
    """What `save_prototypes` wrote.

    Raises:
        BadInput: no such file, a damaged one, pictures of different sizes.
    """
    found, _ = read_tensors(file, "a table of prototypes")
    if not found or {x.ndim for x in found.values()} != {3} or len({tuple(x.shape) for x in found.values()}) > 1:
        raise BadInput(f"{file} is no table of prototypes: give one picture (channel, height, width) a class")
    return found
