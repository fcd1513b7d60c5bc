"""`ImageModel`: a network of pictures (or frames) without text, as the training recipes write it.

What `Text2Image` is for text-to-image pipelines, this is for the project's own pixel models: network, noise process,
and what the output means, saved together. Methods see its `denoiser`, like everybody's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from diffusers import ModelMixin
from jaxtyping import Float
from torch import Tensor

from sfumato import catalog
from sfumato.errors import BadInput, unknown
from sfumato.files import atomic_folder, write_json
from sfumato.noise import Denoiser, GaussianProcess
from sfumato.noise.config import to_config
from sfumato.noise.process import Prediction
from sfumato.progress import track
from sfumato.sample import Clipped, addim, consistency, ddim, ddpm, dpmpp_2m, held_ddim, heun
from sfumato.sample.inversion import invert as inverted
from sfumato.sample.schedulers import check_steps
from sfumato.sample.times import uniform

from .conditioning import Labels
from .contract import Condition, Gradient, Guide, Model, Noised, Start, Told
from .denoise import NetworkDenoiser
from .drawing import (
    Rows,
    ToldDenoiser,
    check_guidance,
    check_interval,
    finished,
    first_step,
    noise,
    right_kind,
    whole,
)
from .hooks import duplicate
from .saving import RECORD, weights_sha256

if TYPE_CHECKING:
    from sfumato.data.base import Pictures

# The last step ends in the picture itself, without noise on it.
SAMPLERS = {
    "ddpm": partial(ddpm, final_noise=False),
    "ddim": ddim,
    "held-ddim": held_ddim,
    "addim": addim,
    "heun": heun,
    "dpm++": dpmpp_2m,
    "consistency": consistency,
}
NETS = "sfumato.nets"
_CARD = """---
tags: [sfumato]
---
# {title}

Loads with `sfumato.load("this folder")`.

```json
{provenance}
```
"""


@dataclass(eq=False)
class ImageModel(Model):
    """A trained network of pictures with the process it was trained under; `sf.load` reads what `save` writes.

    Attributes:
        network: called as `sfumato.nets` says.
        process: the noise process; the network is told the log-SNR of its schedule.
        prediction: what the network's output is.
        shape: of one sample: (channel, height, width), or (frame, channel, height, width).
        labels: names of the classes; empty for a model without.
        defaults: how `draw` draws unless told otherwise: ``scheduler`` and its ``options`` (arguments by name),
            ``sampling_steps``, ``cfg_scale``, ``cfg_interval`` (log-SNRs), ``clip`` (x0 is held to [-1, 1]),
            ``distilled_steps`` (the only number of steps that it can take, if it was distilled) and ``start_time``
            (whose noise it starts from).

    Raises:
        BadInput: a default of another name.
    """

    network: ModelMixin
    process: GaussianProcess
    prediction: Prediction
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)

    own_defaults: ClassVar[tuple[str, ...]] = ()
    """The names of defaults that a kind of model adds."""
    further: ClassVar[Mapping[str, tuple[type[ModelMixin], ...]]] = MappingProxyType({})
    """The fields that hold a kind of model's other networks, and of which classes these may be; saved beside it."""

    def __post_init__(self) -> None:
        self.shape, self.labels = tuple(self.shape), tuple(self.labels)
        base = {
            "scheduler": "ddpm", "options": {}, "sampling_steps": 256, "distilled_steps": None, "cfg_scale": 1.0,
            "cfg_interval": None, "clip": True, "start_time": 1.0,
        }  # fmt: skip
        for name in self.defaults:
            if name not in (*base, *self.own_defaults):
                raise unknown("default of a model", name, (*base, *self.own_defaults))
        self.defaults = {**base, **self.defaults}
        self.denoiser = NetworkDenoiser(self)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def size(self) -> int:
        """Side of a picture in pixels."""
        return self.shape[-1]

    @property
    def scheduler_name(self) -> str:
        return str(self.defaults["scheduler"])

    @property
    def distilled_steps(self) -> int | None:
        return self.defaults["distilled_steps"]

    def parts(self) -> dict[str, torch.nn.Module]:
        """The model's neural networks by name, as `Text2Image.parts`."""
        return {"network": self.network}

    def call(
        self, z: Float[Tensor, "batch *dims"], t: Float[Tensor, "..."] | float, cond: Any
    ) -> Float[Tensor, "batch *dims"]:
        network, times = self.network, z.shape[: z.ndim - 3]
        logsnr = self.process.schedule.level(t)
        if logsnr.ndim:
            # A time per picture may come padded with ones, ready to broadcast against z.
            logsnr = logsnr.reshape(logsnr.shape + (1,) * (len(times) - logsnr.ndim))
            if logsnr[(..., *[0] * (logsnr.ndim - len(times)))].numel() != logsnr.numel():
                raise ValueError(f"a time of shape {tuple(logsnr.shape)}: this network takes one per picture or frame")
            logsnr = logsnr.reshape(logsnr.shape[: len(times)])
        # Clean data have infinite log-SNR; networks are trained on finite ones.
        logsnr = logsnr.clamp(-20.0, 20.0).expand(times).to(z.device, network.dtype)
        cond = self.unconditional() if cond is None else cond
        heard = None if cond is None else self.heard(cond, z)
        return network(z.to(network.dtype), logsnr, heard).to(z.dtype)

    def heard(self, cond: Any, z: Float[Tensor, "batch *dims"]) -> Any:
        """The third argument of the network, for a condition with as many rows as ``z`` or one for all."""
        return cond.numbers.to(z.device).expand(len(z))

    def latent_shape(self, size: int | None = None) -> tuple[int, ...]:
        """The shape of what the denoiser works on, without the batch: here the pictures themselves."""
        if size not in (None, self.size):
            raise BadInput(f"this model has one size: {self.size} pixels a side, not {size}")
        return self.shape

    def encode_image(
        self, x: Float[Tensor, "n *shape"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n *shape"]:
        """``x`` as it is, for this model has no autoencoder."""
        return x

    def decode_latents(self, z: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """``z`` as it is, for this model has no autoencoder."""
        return z

    def told(self, asked: str | int | Sequence[str | int] | Tensor | Condition | None) -> Labels | None:
        """Classes by name or number; None as `unconditional`.

        Raises:
            BadInput: no such class, a model without classes, a condition of another kind.
        """
        if asked is None:
            return self.unconditional()
        if (told := right_kind(asked, Labels, "classes")) is not None:
            return told
        if not self.labels:
            raise BadInput("this model was trained without classes: leave the labels out")
        several: Any = [asked] if isinstance(asked, str | int) else asked
        given = several.tolist() if torch.is_tensor(several) else list(several)
        for label in given:
            if label not in self.labels if isinstance(label, str) else not 0 <= label < len(self.labels):
                raise unknown("class", str(label), self.labels)
        ids = [self.labels.index(x) if isinstance(x, str) else int(x) for x in given]
        return Labels(torch.tensor(ids, device=self.device))

    def asked_for(self, pictures: Pictures, rows: Sequence[int]) -> list[str] | None:
        """The names of these pictures' classes; None for a model without classes."""
        if not self.labels:
            return None
        if tuple(pictures.label_names) != self.labels:
            ours, theirs = (", ".join(names) or "none" for names in (self.labels, pictures.label_names))
            raise BadInput(f"the model knows the classes {ours}; these pictures have {theirs}")
        return [self.labels[pictures.label(i)] for i in rows]

    def unconditional(self, n: int = 1) -> Labels | None:
        """"No class", ``n`` times; None for a model without classes."""
        return Labels(torch.full((n,), len(self.labels), device=self.device)) if self.labels else None

    def copy(self, own: str | None = None) -> Self:
        """A new model that shares this one's weights (frozen), or with ``own`` = "full" has its own, to be trained.

        Raises:
            BadInput: another ``own``.
        """
        if own not in (None, "full"):
            raise BadInput(f"a copy owns None or 'full', not {own!r}")
        memo = {}
        for x in self.network.parameters():
            data = x.detach().clone() if own else x.detach()
            memo[id(x)] = torch.nn.Parameter(data, requires_grad=own is not None)
        network = duplicate(self.network, memo).eval()
        return dataclasses.replace(self, network=network, defaults=dict(self.defaults))

    def draw(
        self,
        asked: str | int | Sequence[str | int] | Condition | None,
        seeds: int | Sequence[int],
        *,
        sampling_steps: int | None = None,
        cfg_scale: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        negative: str | int | Condition | None = None,
        scheduler: str | Callable[..., Tensor] | None = None,
        size: int | None = None,
        batch: int = 64,
        start: Start | None = None,
        cond: Told | None = None,
        guide: Guide | None = None,
        grad: Gradient = False,
        progress: bool = False,
    ) -> Float[Tensor, "n *shape"]:
        """One picture in [0, 1] per (class, seed), on the CPU, in float32; see `Model.draw`.

        Args:
            cfg_interval: (low, high): guide only at log-SNRs in it.
            scheduler: "ddpm", "ddim", "held-ddim", "addim", "heun", "dpm++", "consistency", one of the catalogue by its
                name ("s2n") or any of `sfumato.sample` itself (``S2N(rho=0.3)``); None for the model's.
        """
        rows = Rows.make(self, asked, seeds, cond, start, negative, size)
        solver = self.solver(scheduler)
        steps = self.sampling_steps if sampling_steps is None else whole(sampling_steps, "sampling_steps")
        check_steps(steps, self.distilled_steps)
        times = self.walk(steps)
        parts = []
        with torch.set_grad_enabled(bool(grad)):
            for some in track(rows.chunks(batch), "drawing", progress):
                generators = some.generators()
                denoiser = self.guided(
                    some.told(self.told), cfg_scale, cfg_interval, len(some), some.negative, guide, grad
                )
                way, z = self._begin(some.start, times, generators)
                drawn = self.decode_latents(solver(denoiser, z, way, generator=generators))
                parts.append(finished(drawn, grad, some.seeds))
        return torch.cat(parts)

    def walk(self, sampling_steps: int) -> Float[Tensor, "steps+1"]:
        """The times that a draw in so many steps visits, from the noisiest to the clean picture."""
        return uniform(sampling_steps, self.defaults["start_time"])

    def solver(self, scheduler: str | Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
        """The sampler that `draw` uses for ``scheduler``, called as those of `sfumato.sample`.

        Raises:
            BadInput: no such sampler.
        """
        solver = _sampler(self.defaults["scheduler"] if scheduler is None else scheduler)
        if scheduler in (None, self.defaults["scheduler"]):
            solver = partial(solver, **self.defaults["options"])  # they say nothing about another sampler
        return solver

    def _begin(
        self, start: Start | None, times: Float[Tensor, "steps+1"], generators: list[torch.Generator]
    ) -> tuple[Float[Tensor, "left"], Float[Tensor, "n *shape"]]:
        """The times that are left to walk, and z at the first of them."""
        if isinstance(start, tuple):
            later = times[times < start[1] - 1e-9]
            if not len(later) or start[1] > 1:
                raise BadInput(f"a start lies at a time in (0, 1], not at {start[1]}")
            same = times[(times - start[1]).abs() <= 1e-9]
            return torch.cat([same if len(same) else times.new_tensor(start[1:]), later]), start[0].to(self.device)
        if isinstance(start, Noised):
            times = times[first_step(start.strength, len(times) - 1) :]
            x0 = self.encode_image(start.pictures.to(self.device) * 2 - 1)
            eps = noise(generators, self.shape).to(self.device)
        else:
            eps = (noise(generators, self.shape) if start is None else start).to(self.device)
            x0 = torch.zeros_like(eps)  # noise of this process, in its scale
        return times, self.process.diffuse(x0, times[0], eps)

    def guided(
        self,
        cond: Told | None = None,
        cfg_scale: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        n: int = 1,
        negative: str | int | Condition | None = None,
        guide: Guide | None = None,
        grad: Gradient = False,
    ) -> Denoiser:
        """The denoiser that `draw` uses for ``n`` pictures: told, guided and clipped as asked for, else by default."""
        scale = check_guidance(self.defaults["cfg_scale"] if cfg_scale is None else cfg_scale)
        interval = self.defaults["cfg_interval"] if cfg_interval is None else cfg_interval
        check_interval(interval)
        empty = self.unconditional(n) if negative is None else self.told(negative)
        denoiser = ToldDenoiser(
            self.denoiser, cond, empty, scale, tuple(interval) if interval else None, "logsnr", guide,
            again=grad == "checkpoint",
        )  # fmt: skip
        return Clipped(denoiser) if self.defaults["clip"] else denoiser

    def invert(
        self, z: Float[Tensor, "n *shape"], cond: Labels | None, sampling_steps: int
    ) -> Float[Tensor, "n *shape"]:
        """See `Model.invert`; nothing is clipped on the way, so what clipping changed comes back less exactly."""
        check_steps(whole(sampling_steps, "sampling_steps"), self.distilled_steps)
        first, process = self.defaults["start_time"], self.process
        z = inverted(self.denoiser, z, uniform(sampling_steps, 0.0, first), cond)
        return process.from_basis(process.to_basis(z) / process.alpha_sigma(first, z)[1])

    def describe(self) -> dict[str, Any]:
        """What the model is: network, process, prediction, size, hash of its weights."""
        return {
            "family": "image",
            "network": type(self.network).__name__,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "process": to_config(self.process),
            "prediction": self.prediction,
            "shape": list(self.shape),
            "labels": list(self.labels),
            "sha256": weights_sha256(self.parts()),
        }

    def save(self, folder: str | Path, overwrite: bool = False, provenance: dict[str, Any] | None = None) -> Path:
        """Write the model, whole or not at all: ``network/`` in diffusers' layout, ``model_index.json``, a record.

        Raises:
            BadInput: the folder exists (without ``overwrite``), or the disk is full.
        """
        index = {
            "_class_name": type(self).__name__,
            **{name: [_library(part), type(part).__name__] for name, part in self.parts().items()},
            "process": to_config(self.process),
            "prediction": self.prediction,
            "shape": list(self.shape),
            "labels": list(self.labels),
            "defaults": self.defaults,
        }
        with atomic_folder(folder, overwrite) as temporary:
            for name, part in self.parts().items():
                cast(Any, part).save_pretrained(temporary / name, safe_serialization=True)
            write_json(temporary / "model_index.json", index)
            write_json(temporary / RECORD, {"description": self.describe(), "provenance": provenance or {}})
            text = _CARD.format(title=Path(folder).name, provenance=json.dumps(provenance or {}, indent=2, default=str))
            (temporary / "README.md").write_text(text, encoding="utf-8")
        return Path(folder)


def _library(part: torch.nn.Module) -> str:
    return NETS if type(part).__module__.startswith(NETS) else type(part).__module__.partition(".")[0]


def _sampler(chosen: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    methods = {m.name: m for m in catalog.methods("sample")}
    known: Any = SAMPLERS
    if callable(chosen):
        return chosen
    if chosen in methods:
        return methods[chosen].load()()
    if chosen not in SAMPLERS:
        raise unknown("scheduler", str(chosen), (*SAMPLERS, *methods))
    return known[chosen]
