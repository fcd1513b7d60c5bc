"""The contract for models: what pipelines, pixel models and models of frames are asked alike, and what they are told.

Whoever keeps to `Model` and `Condition` need not know which model it has, nor what kind of thing it is told.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.noise import Denoiser, GaussianProcess
from sfumato.noise.process import Prediction

if TYPE_CHECKING:
    from sfumato.data.base import Pictures


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told besides the noisy input and the time: rows, one a sample, to be picked, joined, dropped.

    A kind of condition is a frozen dataclass each of whose fields says something of every row: a tensor with the batch
    first, a tuple with one item a row, another condition, or None (not said). So text is one (`Conditioning`), class
    numbers are (`Labels`), given frames (`Frames`) and pictures (`Seen`); tokens and cameras are others, and graphs
    padded to the largest of them, with a mask.
    """

    def __len__(self) -> int:
        return next(len(value) for value in self._said().values())

    def __getitem__(self, index: slice | int | list[int] | Tensor) -> Self:
        """Rows ``index`` (an int keeps the batch dimension)."""
        rows = torch.arange(len(self))[index if not isinstance(index, int) else [index]]
        return self.replace(**{name: _picked(value, rows) for name, value in self._said().items()})

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same condition with ``fn`` applied to every tensor."""
        mapped = {}
        for name, value in self._said().items():
            if isinstance(value, Condition):
                mapped[name] = value.map(fn)
            elif torch.is_tensor(value):
                mapped[name] = fn(value)
        return self.replace(**mapped)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields replaced, e.g. ``cond.replace(tokens=edited)``."""
        return dataclasses.replace(self, **changes)

    def repeat(self, n: int) -> Self:
        """Every row ``n`` times, copies of one row adjacent."""
        return self[torch.arange(len(self)).repeat_interleave(n)]

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, in order; the parts must say the same fields."""
        return parts[0].replace(**{name: _joined([getattr(p, name) for p in parts]) for name in parts[0]._said()})

    def drop(self, mask: Bool[Tensor, "batch"], empty: Self) -> Self:
        """What is left where the condition is dropped, as for guidance: rows of ``empty`` where ``mask`` is True.

        A kind of which some part is never dropped (the camera of a view, a class's prototype) keeps that part here.

        Args:
            empty: what tells the model nothing, as `Model.unconditional` gives it; as many rows, or one for all.
        """
        n = len(self)
        empty = empty.repeat(n) if len(empty) == 1 else empty
        if mask.all():
            return empty
        rows = torch.arange(n)
        return self.cat([self, empty])[torch.where(mask.cpu(), rows + n, rows)]

    def guided_at(self, scale: float) -> bool:
        """Whether guidance of this scale changes a prediction."""
        return scale != 1

    def between(self, empty: Condition) -> Sequence[tuple[Condition, Float[Tensor, "batch"]]]:
        """What guidance passes on its way from ``empty`` to this: conditions, each with a scale for every row.

        With one, m of scale s_m: u + s_m (m - u) + s (c - m). None, but for a kind of condition that says less in
        between, such as pictures without the words that go with them.
        """
        return ()

    def _said(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x for name, x in values.items() if x is not None and not (isinstance(x, tuple) and not x)}


def _picked(value: Any, rows: Tensor) -> Any:
    if torch.is_tensor(value):
        return value[rows.to(value.device)]
    return tuple(value[i] for i in rows.tolist()) if isinstance(value, tuple) else value[rows]


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(item for part in parts for item in part)
    return torch.cat(list(parts)) if torch.is_tensor(parts[0]) else type(parts[0]).cat(parts)


@dataclass(frozen=True)
class Noised:
    """Pictures to start from, with noise on them (img2img); the noise is that of the seeds.

    Attributes:
        pictures: in [0, 1]; one for each that is drawn, or one for all.
        strength: how much is drawn anew, in (0, 1]: the share of the denoising steps that are taken.
    """

    pictures: Float[Tensor, "n 3 height width"]
    strength: float

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise BadInput(f"strength must lie in (0, 1], got {self.strength}: 1 draws anew, small changes little")


Told: TypeAlias = Condition | Callable[[float], Condition]
"""A condition, or one for every time in [0, 1] (1 = noise): per-stage prompts."""
Start: TypeAlias = Float[Tensor, "n *dims"] | tuple[Float[Tensor, "n *dims"], float] | Noised
"""Noise instead of the seeds' (such as `Model.invert` finds), a latent and the time that it belongs to, or pictures."""
Guide: TypeAlias = Callable[[Tensor, Tensor, float, Condition | None], Tensor]
"""``guide(pred, z, t, cond) -> pred``: changes a prediction, which is of the kind that the model's denoiser makes."""
Gradient: TypeAlias = bool | Literal["checkpoint"]
"""Whether a draw is differentiable; "checkpoint": with the network's calls computed again in the backward pass."""


class Model(ABC):
    """A model of pictures (or frames) as every method sees it: `Text2Image`, `ImageModel`, `VideoModel`.

    Attributes:
        network: the network that removes noise.
        denoiser: the same as a `Denoiser`, for noisy latents and a `Condition`.
        process: the noise process that it was trained under.
        prediction: what the network's output is.
        defaults: how `draw` draws unless told otherwise: ``cfg_scale``, ``sampling_steps`` and what a model adds.
        adapters: what is attached to the network, by name; a kind of model that takes none has none.
    """

    network: nn.Module
    denoiser: Denoiser
    process: GaussianProcess
    prediction: Prediction
    defaults: dict[str, Any]
    adapters: Mapping[str, Any] = MappingProxyType({})
    drawn_by: ClassVar[tuple[str, str]] = ("pictures", "sample")
    """What it draws, and the command that draws with it."""

    # What it is made of

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its networks are."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Side of a picture in pixels, unless another is asked for."""

    @property
    def sampling_steps(self) -> int:
        """Denoising steps of a draw unless others are asked for: those it was made or distilled for, else 25."""
        return self.defaults.get("sampling_steps", 25)

    @property
    @abstractmethod
    def scheduler_name(self) -> str:
        """Whose steps a draw takes unless another scheduler is named."""

    @property
    def distilled_steps(self) -> int | None:
        """The only number of steps in which it can draw, if it was distilled to one."""
        return None

    @property
    def cleanest(self) -> float:
        """The least noisy time that its network was trained on."""
        return 0.0

    @property
    def last(self) -> nn.Module:
        """The layer that every run of the network ends with, even where a patch runs parts of it by themselves."""
        return self.network

    @property
    def autoencoder(self) -> nn.Module | None:
        """What turns pictures into what the denoiser works on; None where it works on the pictures themselves."""
        return None

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Its neural networks by name."""

    @abstractmethod
    def call(self, z: Float[Tensor, "n *latent"], t: Float[Tensor, "..."] | float, cond: Any) -> Tensor:
        """Run the network at time ``t``; for `denoiser`, which says more."""

    # What it is told

    @abstractmethod
    def told(self, asked: Any) -> Condition | None:
        """What is asked for (prompts, classes, frames, pictures, a condition) as the denoiser is told it.

        Args:
            asked: one, or a sequence of them; None is nothing: `unconditional`.

        Raises:
            BadInput: something that this model cannot be asked for, a condition of another kind.
        """

    @abstractmethod
    def unconditional(self, n: int = 1) -> Condition | None:
        """What tells the denoiser nothing, in ``n`` rows; None for a model that is never told anything."""

    @abstractmethod
    def asked_for(self, pictures: Pictures, rows: Sequence[int]) -> list[Any] | None:
        """What one asks for to have pictures such as these of a data set: captions, class names; None is nothing.

        Raises:
            BadInput: classes that are not the model's.
        """

    def asking(self, words: Sequence[str], pictures: Sequence[Path]) -> list[Any]:
        """What one asks for with words, or with files of pictures: for each of them one thing, as `told` takes it.

        A model that is told words and shown pictures that go with them asks for one thing for each of ``words``.

        Raises:
            BadInput: words and pictures, where it is told the one or shown the other.
        """
        if words and pictures:
            raise BadInput(
                "give prompts or --image, not both: this model is told the one or shown the other (with --strength "
                "it starts from the picture)"
            )
        return list(words or pictures)

    # Pictures

    @abstractmethod
    def latent_shape(self, size: int | None = None) -> tuple[int, ...]:
        """The shape of what the denoiser works on, without the batch.

        Raises:
            BadInput: a side in pixels that the model cannot draw.
        """

    @abstractmethod
    def encode_image(self, x: Float[Tensor, "n 3 height width"], generator: torch.Generator | None = None) -> Tensor:
        """Pictures in [-1, 1] as what the denoiser works on, differentiable."""

    def scale_latents(self, z: Float[Tensor, "n *latent"]) -> Float[Tensor, "n *latent"]:
        """The autoencoder's own latents in the scale in which the denoiser sees them; without one ``z`` itself."""
        return z

    @abstractmethod
    def decode_latents(self, z: Float[Tensor, "n *latent"]) -> Float[Tensor, "n *dims"]:
        """Pictures in about [-1, 1] (not clipped) of what the denoiser works on, differentiable."""

    @abstractmethod
    def draw(
        self,
        asked: Any,
        seeds: int | Sequence[int],
        *,
        sampling_steps: int | None = None,
        cfg_scale: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        negative: Any = None,
        scheduler: Any = None,
        size: int | None = None,
        batch: int = 32,
        start: Start | None = None,
        cond: Told | None = None,
        guide: Guide | None = None,
        grad: Gradient = False,
        progress: bool = False,
    ) -> Float[Tensor, "n *dims"]:
        """One picture in [0, 1] for every thing asked and seed, on the CPU, in float32.

        A picture depends on what is asked, its seed and the settings, not on its neighbours in a batch: all its
        randomness comes from a CPU generator of its own. The size of the batch, the number of threads and the device
        show in rounding only, by which a few pixels in ten thousand may be the next of their 256 levels.

        Args:
            asked: as for `told`; one goes with every seed. None is drawn without being told anything.
            seeds: one per picture; one goes with everything asked.
            sampling_steps: denoising steps; default: `sampling_steps`.
            cfg_scale: guidance, u + cfg_scale (c - u); 1 is none. Default: the model's.
            cfg_interval: (low, high): guide only at noise levels in it.
            negative: what guidance steers away from, as for `told`; None is what the model itself takes.
            scheduler: whose steps are taken: a name, or what else the model knows; None for its own.
            size: side in pixels; default the model's.
            batch: pictures computed together; changes memory and speed, and the last bits of a picture.
            start: noise instead of the seeds', a latent and its time, or `Noised` pictures; one for all, or one each.
                Of the walk from noise to picture only what lies behind the start is walked.
            cond: a condition instead of what is asked, or a function that gives one for each time; rows as for
                ``asked``.
            guide: changes each prediction, after guidance; it is called without gradients unless it enables them.
            grad: the pictures are differentiable in all that they were made from, and stay on the model's device in
                its precision; "checkpoint" takes the memory of one network call, and one call more for each.
            progress: show a bar.

        Raises:
            BadInput: numbers of things asked, seeds and starts that do not match, a size, scheduler, step count or
                time to start from that cannot be.
        """

    @abstractmethod
    def invert(
        self, z: Float[Tensor, "n *latent"], cond: Condition | None, sampling_steps: int
    ) -> Float[Tensor, "n *latent"]:
        """The noise from which ``draw(..., start=noise)`` comes to the clean latents ``z``, without guidance.

        Deterministic: DDIM backwards, on flows Euler's rule. First order: the error falls as the steps grow in number.

        Args:
            z: clean latents, of `encode_image`; differentiable where gradients are enabled.
            cond: what the denoiser is told on the way; as many rows, or one for all.
        """

    @abstractmethod
    def walk(self, sampling_steps: int) -> Float[Tensor, "steps+1"]:
        """The times that a deterministic draw in so many steps visits, the noisiest first, and that of its end."""

    # Copies and files

    @abstractmethod
    def copy(self, own: Any = None) -> Self:
        """A new model that shares this one's weights (frozen) but those it owns, which are to be trained."""

    def frozen_copy(self) -> Self:
        """``copy()``: the same weights, frozen, for losses that compare with the original."""
        return self.copy()

    @abstractmethod
    def save(self, folder: str | Path, overwrite: bool = False, provenance: dict[str, Any] | None = None) -> Path:
        """Write the model, whole or not at all, so that `sfumato.load` reads it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the model is: family, prediction, sizes, and a SHA-256 over its weights."""
