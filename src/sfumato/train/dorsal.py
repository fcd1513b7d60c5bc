"""DORSal: all views of a scene denoised together, told of the slots of its objects."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import ModelMixin
from jaxtyping import Float
from torch import Tensor

from sfumato.data.cameras import Cameras, stacked
from sfumato.data.views import Views, open_views
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, Positive
from sfumato.nets import OSRT, ViewUNet
from sfumato.noise import Denoiser
from sfumato.noise.process import compose
from sfumato.pipeline import Scene, Slots, ViewModel
from sfumato.plan import Plan
from sfumato.sample.paths import Order

from . import draw
from .cosine import CosineRecipe
from .loop import Run
from .osrt import OSRTTraining, in_frame, pictures_of, some_views
from .pixels import PixelTraining
from .state import configuration, goes_on, rows_of

_OSRT = {"slots": "osrt", "inputs": 5, "views": 5, "osrt_batch": 256, "osrt_updates": 4_000_000, "osrt_lr": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Dorsal(CosineRecipe):
    """Diffusion of several views of a scene at once, conditioned on object slots and on the views' cameras.

    arXiv:2306.08068. x in R^{L x H x W x 3} are L views of one scene; x_t = alpha_t x + sigma_t e with one t for all
    views; the loss is E ||e - e_theta(x_t, t, S, P)||^2. The slots S are those of a frozen OSRT encoder
    (arXiv:2206.06922), which this recipe trains first (``slots="osrt"``), or what the data say of objects. Cameras P
    are told in the frame of the scene's first. The network is Video Diffusion's U-Net (arXiv:2204.03458) without an
    order of frames; its views are a set of any size. The model renders: ``model.render(slots, cameras)``; slots can be
    left out (`sfumato.pipeline.slots.edit`) or taken over from other scenes (`transfer`), and long paths are drawn in
    blocks that change from step to step. `sfumato views` does all that from the command line.

    There is no official code. Unconfirmed by a source at hand: the cosine schedule, L, the optimiser. Ours, where the
    paper's wiring is not known: the two ways of the condition (FiLM by log-SNR + camera + mean slot; cross-attention to
    slots and the view's camera), the map of rays beside the noisy views, slots left out in training (``label_dropout``
    of all, ``slot_dropout`` of single ones), which makes edits familiar and guidance possible; and the three kinds of
    blocks of long paths. The encoder's shapes are those of independent code for OSRT.
    Differs from the paper: FiLM modulates the second of each block's normalisations; OSRT is shown a scene's first
    views, always the same, and weights begin as torch's layers do.
    Cost: one network call with gradients on all views, and one of the encoder, per update; the encoder's own training
    before.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **CosineRecipe.EXAMPLE, "pictures": 3, "slots": "osrt", "views": 2, "inputs": 2, "channels": (8, 8),
        "layers": 1, "attention_from": 4, "head_dim": 8, "embedding": 16, "octaves": 3, "first_octave": -1, "rays": 4,
        "n_slots": 3, "slot_dim": 8, "osrt_updates": 2, "osrt_batch": 2, "osrt_channels": 4, "osrt_blocks": 1,
        "osrt_tokens": 8, "osrt_depth": 1, "osrt_heads": 2, "osrt_rays": 16, "sampling_steps": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "msn-hard": {
            **_OSRT, "size": 64, "n_slots": 32, "osrt_rays": 2304, "channels": (128, 256, 512, 512), "embedding": 512,
            "head_dim": 64, "batch": 64, "updates": 1_000_000, "precision": "bf16",
        },
        "small": {
            "views": 3, "octaves": 8, "first_octave": -3, "weighting": "v", "batch": 16, "lr": 1e-3, "warmup": 200,
            "ema": 0.999, "updates": 6000, "sampling_steps": 64, "scheduler": "ddim",
        },
        "tiny": {
            "size": 24, "pictures": 2000, "views": 3, "octaves": 6, "first_octave": -2, "weighting": "v",
            "channels": (24, 40, 64), "layers": 1, "attention_from": 12, "head_dim": 8, "embedding": 96, "rays": 24,
            "batch": 8, "lr": 2e-3, "warmup": 100, "ema": 0.995, "updates": 3000, "sampling_steps": 32,
            "scheduler": "ddim",
        },
        "small-osrt": {
            "slots": "osrt", "views": 3, "inputs": 4, "n_slots": 6, "slot_dim": 96, "octaves": 8, "first_octave": -3,
            "weighting": "v", "batch": 16, "lr": 1e-3, "warmup": 200, "ema": 0.999, "updates": 6000,
            "sampling_steps": 64, "scheduler": "ddim", "osrt_channels": 24, "osrt_blocks": 2, "osrt_tokens": 96,
            "osrt_depth": 3, "osrt_heads": 4, "osrt_updates": 10_000, "osrt_batch": 32, "osrt_rays": 512,
            "osrt_lr": 3e-4,
        },
    }  # fmt: skip
    """``msn-hard``: the paper's kind of model, with OSRT as independent code trains it; the data are to be given as a
    folder. ``small*`` and ``tiny``: for a CPU, on the world of solids, untuned."""

    data: str = "solids"
    """"solids", a world of spheres, boxes and cylinders; "solids-uncoloured", the same whose objects' descriptions
    leave out the colours; or a folder with a subfolder for each scene that has a transforms.json."""
    pictures: Count = 10_000
    """How many scenes of the world of solids."""
    classes: ClassVar[bool] = False  # type: ignore[misc]  # slots are what it is told
    flip: ClassVar[bool] = False  # type: ignore[misc]  # a mirrored picture has no camera
    label_dropout: Decay = 0.1
    """Share of scenes of which nothing is told but the cameras, for guidance."""
    slot_dropout: Decay = 0.1
    """Share of the other scenes' single slots that are left out."""
    noise: Literal["cosine", "shifted", "interpolated"] = "cosine"
    """How log-SNR follows time: plain cosine; moved to suit ``noise_size``; or, from noisy to clean times, moved to
    suit ``noise_size``, then ``clean_size``."""
    weighting: Literal["eps", "v"] = "eps"
    """Whose plain error is minimised: the noise's, or that of v, which counts noisy times more."""
    batch: Count = 32
    """Scenes in an update."""
    views: Count = 4
    """Views of a scene that are denoised together, L."""
    across: bool = True
    """Attend across the views; otherwise each is drawn by itself."""
    slots: Literal["objects", "osrt"] = "objects"
    """What the slots are: what the data say of objects, or what OSRT makes of pictures."""
    inputs: Count = 4
    """First views of a scene that OSRT is shown; others are drawn."""
    n_slots: Count = 6
    """Slots that OSRT makes."""
    slot_dim: Count = 1536
    """Numbers of such a slot."""
    channels: tuple[Count, ...] = (32, 64, 128)
    """Channels of the network's levels, each at half the side of the one before."""
    layers: Count = 2
    """Residual blocks a level, down and again up."""
    attention_from: Natural = 16
    """The largest side of feature maps that attend: within a view, across views, and to the slots."""
    head_dim: Count = 32
    """Channels of an attention head."""
    embedding: Count = 128
    """Width of the embedding of log-SNR, camera and mean slot, and of slots that are attended to."""
    octaves: Count = 15
    """Octaves in which positions and directions are told."""
    first_octave: int = -5
    """The lowest octave of positions; directions begin at 0."""
    rays: Natural = 32
    """Channels of the map of rays beside the noisy view; 0 for none."""
    dropout: Decay = 0.0
    """Dropout at the network's last level."""
    scheduler: Literal["ddpm", "ddim", "dpm++"] = "ddpm"
    """Whose steps the finished model samples in."""
    sampling_steps: Count = 256
    """Steps that the finished model samples in unless told otherwise."""
    order: Order = "mixed"
    """How paths of more views are cut into blocks: neighbours, moved neighbours and chance in turn, or neighbours."""
    osrt_updates: Count = 100_000
    """Updates of OSRT."""
    osrt_batch: Count = 64
    """Scenes in one of them."""
    osrt_lr: Positive = 1e-4
    """OSRT's learning rate."""
    osrt_rays: Count = 2304
    """Rays of a scene in an update; with few, all objects may end in one slot."""
    osrt_channels: Count = 96
    """Channels of OSRT's first convolution."""
    osrt_blocks: Count = 3
    """Pairs of convolutions, each of which halves the side."""
    osrt_tokens: Count = 768
    """Width of OSRT's transformer."""
    osrt_depth: Count = 5
    """Its layers."""
    osrt_heads: Count = 12
    """Its attention heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots == "osrt" and (self.osrt_tokens % self.osrt_heads or self.slot_dim % self.osrt_heads):
            raise BadInput(
                f"osrt_tokens {self.osrt_tokens} and slot_dim {self.slot_dim} must be whole numbers of "
                f"{self.osrt_heads} osrt_heads"
            )

    @property
    def first(self) -> int:
        """The first view that may be drawn: those that OSRT is shown come before."""
        return self.inputs if self.slots == "osrt" else 0

    @cached_property
    def _views(self) -> Views:
        found = open_views(self.data, self.size, self.first + self.views, seed=self.seed, count=self.pictures)
        if self.slots == "objects" and not found.width:
            raise BadInput(f"{self.data} says nothing of its objects: let OSRT find slots, with --slots osrt")
        return found

    def open(self) -> Any:
        return self._views

    def network(self, classes: int) -> ModelMixin:
        width = self.slot_dim if self.slots == "osrt" else self._views.width
        return ViewUNet(
            self.size, width, 3, self.channels, self.layers, self.attention_from, self.head_dim, self.embedding,
            self.octaves, self.first_octave, self.rays, self.across, self.dropout,
        )  # fmt: skip

    def encoder(self) -> OSRT | None:
        """A fresh OSRT, where slots are its."""
        if self.slots == "objects":
            return None
        return OSRT(
            self.n_slots, self.slot_dim, self.osrt_channels, self.osrt_blocks, self.osrt_tokens, self.osrt_depth,
            self.osrt_heads, octaves=self.octaves, first_octave=self.first_octave,
        )  # fmt: skip

    def sampling(self) -> dict[str, Any]:
        cameras = in_frame(self._views, 0).at(range(self.first, self.first + self.views))
        told = {"poses": cameras.poses.tolist(), "focal": cameras.focal.tolist()}
        return {**super().sampling(), "scheduler": self.scheduler, "order": self.order, "cameras": told} | (
            {} if self.scheduler == "ddpm" else {"options": {}}
        )

    def model(self, labels: tuple[str, ...]) -> ViewModel:
        """A fresh model; ``labels`` are none."""
        shape, encoder = (self.views, 3, self.size, self.size), self.encoder()
        net, process, told = self.network(0), self.process(), self.sampling()
        return ViewModel(net, process, self.prediction, shape, (), told, encoder)

    @torch.no_grad()
    def plan(self) -> Plan:
        """That of the views, and OSRT's before: three forward passes an update."""
        plan, encoder = super().plan(), self.encoder()
        if encoder is None:
            return plan
        training = OSRTTraining(encoder, self._views, self.inputs, self.views, self.osrt_rays)
        batch = training.batch(0, torch.Generator().manual_seed(0), 1)
        began = time.perf_counter()
        training.loss(batch, torch.Generator())[0].item()
        seconds = 3 * (time.perf_counter() - began) * self.osrt_batch * self.osrt_updates
        weights = 4 * sum(p.numel() for p in encoder.parameters())
        memory = {**plan.memory, "OSRT, its gradients and optimiser": 5 * weights}
        return replace(plan, memory=memory, seconds=(plan.seconds or 0) + seconds)

    def known(self, rows: list[int]) -> dict[str, Tensor]:
        """What slots of these scenes of the data are made from, in the frame of each scene's first camera."""
        views = self._views
        if self.slots == "objects":
            slots = Slots.of([views.objects(row) for row in rows], torch.eye(4).expand(len(rows), 4, 4))
            slots = slots.padded(views.most)
            return {"values": slots.values, "there": slots.there}
        shown = list(range(self.inputs))
        cameras = stacked([in_frame(views, row).at(shown) for row in rows])
        pictures = torch.stack([pictures_of(views, row, shown) for row in rows])
        return {"shown": pictures, "poses": cameras.poses, "focal": cameras.focal}

    def slots_of(self, model: ViewModel, known: Mapping[str, Tensor]) -> Slots:
        """The slots that `known` says, or OSRT sees."""
        if self.slots == "osrt":
            return model.encode(known["shown"], Cameras(known["poses"], known["focal"]))
        frame = torch.eye(4).expand(len(known["values"]), 4, 4)
        return Slots(known["values"], known["there"], frame).map(lambda x: x.to(model.device))

    def loss(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "batch view channel height width"],
        t: Float[Tensor, "batch"],
        eps: Float[Tensor, "batch view channel height width"],
        cond: Any,
    ) -> Float[Tensor, "batch"]:
        process = denoiser.process
        z = process.diffuse(x, t, eps)
        guess = process.convert(denoiser(z, t, cond), z, t, denoiser.prediction, self.weighting)
        due = eps if self.weighting == "eps" else compose(x, eps, *process.alpha_sigma(t, x), "v")
        return (guess - due).square().flatten(1).mean(1)

    def grid(self, model: Any, pictures: Any, rng: torch.Generator, n: int) -> Float[Tensor, "n 3 h w"]:
        """Scenes, of each a row of true views and one of drawn ones."""
        rows = torch.randint(len(pictures), (max(1, n // (2 * self.views)),), generator=rng).tolist()
        seeds = torch.randint(2**31, (len(rows),), generator=rng).tolist()
        which = list(range(self.first, self.first + self.views))
        cameras = stacked([in_frame(pictures, row).at(which) for row in rows])
        steps = min(50, model.defaults["sampling_steps"])
        drawn = model.render(self.slots_of(model, self.known(rows)), cameras, seeds, sampling_steps=steps)
        truth = torch.stack([pictures_of(pictures, row, which) for row in rows])
        return torch.stack([truth, drawn], dim=1).flatten(0, 2)

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        views = self._views
        own = {**self.beyond(), **rows_of(self.data, views)}
        goes_on(out / "training", configuration(self.name(), self, own))
        torch.manual_seed(self.seed)
        model = self.model(())
        if model.encoder is not None:
            updates, batch, lr = self.osrt_updates, self.osrt_batch, self.osrt_lr
            schedule = replace(self.schedule(), updates=updates, batch=batch, lr=lr, grid_every=0)
            training = OSRTTraining(model.encoder, views, self.inputs, self.views, self.osrt_rays)
            Run(training, schedule, out / "osrt", own).fit(progress)
            model.encoder.requires_grad_(False).eval()
        run = Run(DorsalTraining(self, model, views), self, out / "training", own)
        run.fit(progress)
        model.network.eval()
        run.finish(lambda: model.save(out / "model", overwrite=overwrite, provenance=self.made()))


class DorsalTraining(PixelTraining):
    """`Dorsal` as the loop sees it, on scenes of ``views``."""

    def __init__(self, recipe: Dorsal, model: ViewModel, views: Views):
        scenes: Any = views  # in place of pictures
        super().__init__(recipe, model, scenes)
        self.dorsal, self.shown, self.views = recipe, model, views

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        recipe, rows = self.dorsal, draw.integers(len(self.views), size, rng).tolist()
        chosen = some_views(self.views.each, recipe.first, recipe.views, size, rng).tolist()
        drawn = list(zip(rows, chosen, strict=True))
        x = torch.stack([pictures_of(self.views, row, which) for row, which in drawn]) * 2 - 1
        cameras = stacked([in_frame(self.views, row).at(which) for row, which in drawn])
        given = draw.uniform(size, rng) >= recipe.label_dropout
        places = recipe.n_slots if recipe.slots == "osrt" else self.views.most
        kept = torch.special.ndtr(draw.normal((size, places), rng)) >= recipe.slot_dropout
        told = {"target_poses": cameras.poses, "target_focal": cameras.focal, "kept": kept & given[:, None]}
        return {"x": x, **told, **recipe.known(rows)}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.model.device
        x = batch["x"].to(device)
        t = self.recipe.times(len(x), rng).to(device)
        eps = draw.normal(x.shape, rng).to(device)
        slots = self.dorsal.slots_of(self.shown, batch)
        slots = slots.replace(there=slots.there & batch["kept"].to(device))
        cond: Any = Scene.seen(slots, Cameras(batch["target_poses"], batch["target_focal"]))
        return self.recipe.loss(self.model.denoiser, x, t, eps, cond).mean(), {}
