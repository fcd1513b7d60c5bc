"""`ImageModel`: a network of pictures (or frames) without text, as the training recipes write it.

What `Text2Image` is for text-to-image pipelines, this is for the project's own pixel models: network, noise process,
and what the output means, saved together. Methods see its `denoiser`, like everybody's.
"""

from __future__ import annotations

import copy as copying
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from sfumato import catalog
from sfumato.errors import BadInput, unknown
from sfumato.files import atomic_folder, write_json
from sfumato.noise import GaussianProcess
from sfumato.noise.config import from_config, to_config
from sfumato.noise.process import Prediction
from sfumato.progress import track
from sfumato.sample import Clipped, Guided, addim, ddim, ddpm, dpmpp_2m, heun
from sfumato.sample.schedulers import check_steps
from sfumato.sample.times import uniform

from .saving import RECORD, quiet, weights_sha256

# The last step ends in the picture itself, without noise on it.
SAMPLERS = {
    "ddpm": partial(ddpm, final_noise=False),
    "ddim": ddim,
    "addim": addim,
    "heun": heun,
    "dpm++": dpmpp_2m,
}
_NETS = "sfumato.nets"
_CARD = """---
tags: [sfumato]
---
# {title}

Loads with `sfumato.load("this folder")`.

```json
{provenance}
```
"""


class NetworkDenoiser:
    """An `ImageModel`'s network as a `Denoiser`; the conditioning is class numbers [batch], or None."""

    def __init__(self, owner: ImageModel):
        self._owner = owner

    @property
    def process(self) -> GaussianProcess:
        return self._owner.process

    @property
    def prediction(self) -> Prediction:
        return self._owner.prediction

    def __call__(
        self, z: Float[Tensor, "batch *dims"], t: Float[Tensor, "..."] | float, cond: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch *dims"]:
        """The network's own prediction, in the dtype of ``z``.

        Args:
            z: noisy pictures, or frames [batch, frame, channel, height, width].
            t: time in [0, 1], 1 = noise: one for all, one per picture, or for frames [batch or 1, frame].
            cond: class numbers; None is "no class".
        """
        network, times = self._owner.network, z.shape[: z.ndim - 3]
        logsnr = self.process.schedule.level(t)
        if logsnr.ndim:
            # A time per picture may come padded with ones, ready to broadcast against z.
            logsnr = logsnr.reshape(logsnr.shape + (1,) * (len(times) - logsnr.ndim))
            if logsnr[(..., *[0] * (logsnr.ndim - len(times)))].numel() != logsnr.numel():
                raise ValueError(f"a time of shape {tuple(logsnr.shape)}: this network takes one per picture or frame")
            logsnr = logsnr.reshape(logsnr.shape[: len(times)])
        # Clean data have infinite log-SNR; networks are trained on finite ones.
        logsnr = logsnr.clamp(-20.0, 20.0).expand(times).to(z.device, network.dtype)
        if self._owner.labels and cond is None:
            cond = self._owner.no_label(len(z))
        out = network(z.to(network.dtype), logsnr, None if cond is None else cond.to(z.device))
        return out.to(z.dtype)


@dataclass(eq=False)
class ImageModel:
    """A trained network of pictures with the process it was trained under; `sf.load` reads what `save` writes.

    Attributes:
        network: called as `sfumato.nets` says.
        process: the noise process; the network is told the log-SNR of its schedule.
        prediction: what the network's output is.
        shape: of one sample: (channel, height, width), or (frame, channel, height, width).
        labels: names of the classes; empty for a model without.
        defaults: how `draw` draws unless told otherwise: ``scheduler`` and its ``options`` (arguments by name),
            ``sampling_steps``, ``cfg_scale``, ``cfg_interval`` (log-SNRs), ``clip`` (x0 is held to [-1, 1]) and
            ``distilled_steps`` (the only number of steps that it can take, if it was distilled).
    """

    network: ModelMixin
    process: GaussianProcess
    prediction: Prediction
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shape, self.labels = tuple(self.shape), tuple(self.labels)
        base = {
            "scheduler": "ddpm", "options": {}, "sampling_steps": 256, "distilled_steps": None, "cfg_scale": 1.0,
            "cfg_interval": None, "clip": True,
        }  # fmt: skip
        self.defaults = {**base, **self.defaults}
        self.denoiser = NetworkDenoiser(self)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def size(self) -> int:
        """Side of a picture in pixels."""
        return self.shape[-1]

    def parts(self) -> dict[str, torch.nn.Module]:
        """The model's neural networks by name, as `Text2Image.parts`."""
        return {"network": self.network}

    def latent_shape(self) -> tuple[int, ...]:
        """The shape of what the denoiser works on, without the batch: here the pictures themselves."""
        return self.shape

    def decode_latents(self, z: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """The pictures of what the denoiser works on: ``z`` as it is, for this model has no autoencoder."""
        return z

    def no_label(self, n: int) -> Int[Tensor, "n"]:
        """The class number that means "no class", ``n`` times."""
        return torch.full((n,), len(self.labels), device=self.device)

    def unconditional(self, n: int = 1) -> Int[Tensor, "n"] | None:
        """The conditioning of `denoiser` that tells it nothing; None for a model without classes."""
        return self.no_label(n) if self.labels else None

    def copy(self, own: str | None = None) -> ImageModel:
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
        network = copying.deepcopy(self.network, memo).eval()
        return type(self)(network, self.process, self.prediction, self.shape, self.labels, dict(self.defaults))

    def frozen_copy(self) -> ImageModel:
        """``copy()``: the same weights, frozen."""
        return self.copy()

    def label_ids(self, labels: Sequence[str | int]) -> Int[Tensor, "n"]:
        """Class numbers of names (or of numbers).

        Raises:
            BadInput: no such class, or a model without classes.
        """
        if not self.labels:
            raise BadInput("this model was trained without classes: leave the labels out")
        for label in labels:
            if label not in self.labels if isinstance(label, str) else not 0 <= label < len(self.labels):
                raise unknown("class", str(label), self.labels)
        ids = [self.labels.index(x) if isinstance(x, str) else int(x) for x in labels]
        return torch.tensor(ids, device=self.device)

    @torch.no_grad()
    def draw(
        self,
        asked: str | int | Sequence[str | int] | None,
        seeds: int | Sequence[int],
        *,
        sampling_steps: int | None = None,
        scheduler: str | Callable[..., Tensor] | None = None,
        cfg_scale: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        batch: int = 64,
        progress: bool = False,
    ) -> Float[Tensor, "n *shape"]:
        """One sample in [0, 1] per seed, on the CPU, in float32; it never depends on the batch it was computed in.

        Args:
            asked: class names or numbers: one for all or one per seed. None: drawn without a class.
            seeds: one per picture, or one number.
            sampling_steps, scheduler, cfg_scale, cfg_interval: default: the model's ``defaults``; schedulers are
                "ddpm", "ddim", "addim", "heun", "dpm++", one of the catalogue by its name ("s2n") or any of
                `sfumato.sample` itself (``S2N(rho=0.3)``); guidance 1 is none, the interval is in log-SNR.
            batch: pictures computed together.
            progress: show a bar.

        Raises:
            BadInput: an unknown scheduler or class, steps that a distilled model cannot take, or numbers of seeds and
                labels that do not match.
        """
        seeds = [seeds] if isinstance(seeds, int) else list(seeds)
        solver = _sampler(self.defaults["scheduler"] if scheduler is None else scheduler)
        if scheduler in (None, self.defaults["scheduler"]):
            solver = partial(solver, **self.defaults["options"])  # they say nothing about another sampler
        cond = None
        if asked is not None:
            names = [asked] * len(seeds) if isinstance(asked, str | int) else list(asked)
            if len(names) != len(seeds):
                raise BadInput(f"{len(names)} labels for {len(seeds)} seeds: give one label for all, or one each")
            cond = self.label_ids(names)
        denoiser = self.guided(cfg_scale, cfg_interval)
        sampling_steps = self.defaults["sampling_steps"] if sampling_steps is None else sampling_steps
        check_steps(sampling_steps, self.defaults["distilled_steps"])
        times = uniform(sampling_steps)
        parts = []
        for start in track(range(0, len(seeds), batch), "sampling", progress):
            generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + batch]]
            z = torch.stack([torch.randn(self.shape, generator=g) for g in generators]).to(self.device)
            rows = None if cond is None else cond[start : start + batch]
            z = self.process.diffuse(torch.zeros_like(z), times[0], z)  # noise of this process, in its scale
            x = solver(denoiser, z, times, rows, generator=generators)
            parts.append(((x.float() + 1) / 2).clamp(0, 1).cpu())
        return torch.cat(parts)

    def guided(self, cfg_scale: float | None = None, cfg_interval: tuple[float, float] | None = None):
        """The denoiser that `draw` uses: guided and clipped as asked for, else as the ``defaults`` say."""
        scale = self.defaults["cfg_scale"] if cfg_scale is None else cfg_scale
        interval = self.defaults["cfg_interval"] if cfg_interval is None else cfg_interval
        denoiser: Any = self.denoiser
        if scale != 1 and self.labels:
            denoiser = _LabelGuided(self, scale, tuple(interval) if interval else None)
        return Clipped(denoiser) if self.defaults["clip"] else denoiser

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
            "network": [_NETS, type(self.network).__name__],
            "process": to_config(self.process),
            "prediction": self.prediction,
            "shape": list(self.shape),
            "labels": list(self.labels),
            "defaults": self.defaults,
        }
        with atomic_folder(folder, overwrite) as temporary:
            self.network.save_pretrained(temporary / "network", safe_serialization=True)
            write_json(temporary / "model_index.json", index)
            write_json(temporary / RECORD, {"description": self.describe(), "provenance": provenance or {}})
            text = _CARD.format(title=Path(folder).name, provenance=json.dumps(provenance or {}, indent=2, default=str))
            (temporary / "README.md").write_text(text, encoding="utf-8")
        return Path(folder)


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


@dataclass(eq=False)
class _LabelGuided:
    """`Guided` for class numbers: "no class" in as many rows as the batch has."""

    model: ImageModel
    scale: float
    interval: tuple[float, float] | None

    @property
    def process(self) -> GaussianProcess:
        return self.model.process

    @property
    def prediction(self) -> Prediction:
        return self.model.prediction

    def __call__(self, z: Tensor, t: Any, cond: Tensor | None = None) -> Tensor:
        if cond is None:
            return self.model.denoiser(z, t)
        nothing = self.model.no_label(len(z))
        return Guided(self.model.denoiser, cond, nothing, self.scale, self.interval, measure="logsnr")(z, t)


def load_image_model(cls: type[ImageModel], folder: Path, index: dict[str, Any], device: torch.device) -> ImageModel:
    """The model of type ``cls`` that `ImageModel.save` wrote.

    Raises:
        BadInput: an unknown network, or files that do not fit.
    """
    library, name = index.get("network", ("", ""))
    kind = getattr(importlib.import_module(_NETS), name, None) if library == _NETS else None
    if kind is None or not issubclass(kind, ModelMixin):
        raise BadInput(f"{folder} names a network {library}.{name}, which {_NETS} does not have")
    try:
        with quiet():
            network = kind.from_pretrained(folder / "network", use_safetensors=True, local_files_only=True)
        process = from_config(index["process"])
        parts = (index["prediction"], tuple(index["shape"]), tuple(index["labels"]), dict(index["defaults"]))
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{folder} could not be loaded as a {name}: {reason}") from error
    return cls(network.requires_grad_(False).eval().to(device), process, *parts)
