"""A pipeline's organs, and what follows from them alone: what the modules behind `Text2Image` see of it."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import diffusers
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.noise import GaussianProcess
from sfumato.noise.process import Prediction
from sfumato.sample.schedulers import RectifiedFlowScheduler

from . import marking, offload
from .anatomy import Anatomy, Projection, UNetAnatomy
from .clock import Clock, FlowClock, TableClock
from .codec import Codec
from .conditioning import Conditioning
from .contract import Model
from .denoise import NetworkDenoiser
from .prompts import Prompts


class Organs(Prompts, Model):
    """A diffusers pipeline with its `Anatomy`, `Clock` and `Codec`, and what acts on it.

    `Text2Image` adds what the modules beside it do with them; these are written against this class, so that nothing
    here knows of them.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    """The family's name in sentences."""
    default_cfg_scale: ClassVar[float]
    control_class: ClassVar[str] = ""
    """Diffusers' class of this family's pipelines with a ControlNet; empty: there is none."""
    anatomy_type: ClassVar[type[Anatomy]] = UNetAnatomy
    may_lack: ClassVar[tuple[str, ...]] = ()
    """Parts that a pipeline of this family can do without, and that diffusers' loader must be told it lacks."""

    halves: ClassVar[Literal["together", "apart"]] = "together"
    """Whether the pipeline's own call, where one can see whether it guides, puts both halves of guidance in a batch."""
    told_by: ClassVar[str] = "encode_prompt"
    """The method of the pipeline that its own call tells the prompts."""
    guides: ClassVar[bool | None] = None
    """Whether the pipeline's own call always guides, where neither it nor what it tells `told_by` says so."""
    conditional_first: ClassVar[bool] = False
    """Whether the pipeline's own call, where both halves of guidance are one batch, puts the conditional half first."""
    rescaled: Callable[[Tensor, Tensor], Tensor] | None = None
    """What a draw makes of the guided and the conditional prediction, where guidance is more than their mixture."""

    def __init__(self, pipe, defaults: dict[str, Any] | None = None):
        self.pipe = pipe
        self.defaults = {"cfg_scale": self.default_cfg_scale, **(defaults or {})}
        self.adapters: dict[str, Any] = {}
        self.learned: list[Any] = []
        self.listeners: list[Any] = []
        self.anatomy = self._make_anatomy()
        self.companions: list[Callable[[Path], None]] = []
        self.origin: str | None = None
        """The embedded model that this pipeline is or was made from, where it is known to be."""
        for part in self.parts().values():
            part.requires_grad_(False).eval()
        self.clock = self._make_clock()
        self.denoiser = NetworkDenoiser(self)

    @classmethod
    @abstractmethod
    def plain(cls, pipe) -> bool:
        """Whether a pipeline of this family makes pictures from noise and a text alone, as this adapter calls it."""

    @classmethod
    def pipelines(cls, name: str) -> Any:
        """Diffusers' class of pipelines of that name, such as can be used here."""
        return getattr(diffusers, name)

    def with_control(self, network: nn.Module) -> DiffusionPipeline:
        """Diffusers' own pipeline of these parts and a ControlNet, to be called as it is; it marks what this one marks.

        Raises:
            BadInput: the family has no such pipeline (`control_class`).
        """
        if not self.control_class:
            raise BadInput(f"{self.title} takes no ControlNet: leave it out")
        made_by = getattr(diffusers, self.control_class)
        accepted = inspect.signature(made_by.__init__).parameters
        given = {k: v for k, v in {**self.pipe.config, **self.pipe.components}.items() if k in accepted}
        made = made_by(**given, controlnet=network)
        made.scheduler = self.pipe.scheduler  # pipelines correct settings of the one that they are given
        made.set_progress_bar_config(disable=True)
        return marking.marking(made, self.defaults["marked"]) if "marked" in self.defaults else made

    def _make_anatomy(self) -> Anatomy:
        return self.anatomy_type(getattr(self.pipe, self.anatomy_type.component))

    def _make_clock(self) -> Clock:
        scheduler = self.pipe.scheduler
        return (FlowClock if isinstance(scheduler, RectifiedFlowScheduler) else TableClock).of(scheduler)

    # What it is made of

    @property
    def network(self) -> nn.Module:
        """The denoising network."""
        return self.anatomy.network

    @property
    def last(self) -> nn.Module:
        return self.anatomy.last

    @property
    def process(self) -> GaussianProcess:
        return self.clock.process

    @property
    def prediction(self) -> Prediction:
        return self.clock.prediction

    @property
    def autoencoder(self) -> nn.Module:
        """The autoencoder whose latents the network denoises."""
        return self.codec.vae

    @property
    def scheduler_name(self) -> str:
        return type(self.pipe.scheduler).__name__

    @property
    def distilled_steps(self) -> int | None:
        return self.pipe.scheduler.config.get("distilled_steps")

    @property
    def cleanest(self) -> float:
        return self.clock.time(0)

    @property
    def control(self) -> nn.Module | None:
        """The pipeline's ControlNet, in the pipelines that `wrap` takes as ``controlled``."""
        return getattr(self.pipe, "controlnet", None)

    @property
    def device(self) -> torch.device:
        return offload.device_of(self.network) or self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.anatomy.dtype

    def parts(self) -> dict[str, nn.Module]:
        """The pipeline's neural networks by component name: unet, vae, text_encoder, ..."""
        return {k: m for k, m in self.pipe.components.items() if isinstance(m, nn.Module)}

    def projections(self, *kinds: str) -> list[Projection]:
        """The projections of the given kinds, in network order; all of them if none is given.

        Args:
            kinds: "cross.q", "cross.k", "cross.v", "cross.out"; the same of "self"; where attention is joint, of
                "joint" (its picture side, and single streams) and of "text" (its text side); "text.in" and
                "pooled.in", the linear maps that read the text encoders' embeddings.

        Raises:
            BadInput: unknown kind, or one that this network does not have.
        """
        return self.anatomy.projections(kinds)

    @torch.no_grad()
    def text_rows(self, cond: Conditioning) -> Float[Tensor, "batch length width"]:
        """The rows that cross-attention's keys and values are made of: the tokens, as the network has them read.

        Closed forms solve for projections of these. In a U-Net they are ``cond.tokens``; PixArt and Sana project those
        first, and do not look at the rows of padding, which are zeros here and so count for nothing.
        """
        offload.wake(self.network)
        return self.as_seen(cond.replace(tokens=self.anatomy.text_rows(cond.tokens))).tokens

    def parameters(self, subset: str = "full") -> dict[str, nn.Parameter]:
        """The network's parameters by name, in one vocabulary for all methods.

        Args:
            subset: "full"; "xattn" (all of cross-attention, or the text side of joint attention); "xattn-strict"
                (its key and value projections); "noxattn" (all but these, the time embedding and the output
                block); "selfattn".

        Raises:
            BadInput: unknown subset, or one that selects nothing in this network.
        """
        return self.anatomy.parameters(subset)

    # What acts on it (`Text2Image` has how)

    @property
    @abstractmethod
    def patches(self) -> tuple[Any, ...]: ...

    @abstractmethod
    def merged(self) -> Self: ...

    # How it is called

    def call(
        self, z: Float[Tensor, "batch channel height width"], t: Float[Tensor, "..."] | float, cond: Conditioning
    ) -> Float[Tensor, "batch channel height width"]:
        n, step = len(z), self.clock.number(t).reshape(-1).to(z.device)
        if step.numel() not in (1, n):
            raise ValueError(f"{step.numel()} times for {n} pictures: this network takes one time per picture")
        if len(cond) < n:
            cond = cond.map(lambda x: x.expand(n, *x.shape[1:]))
        return self.clock.native(self.anatomy.call(z, step.expand(n), cond))

    # Pictures and latents

    @property
    def codec(self) -> Codec:
        """From pictures to what the network denoises, and back."""
        return Codec(self.pipe.vae)

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return self.codec.factor

    @property
    def size(self) -> int:
        """Side of a picture in pixels, unless another is asked for: the ``size`` of `defaults`, or the network's."""
        return self.defaults.get("size") or self._size()

    def _size(self) -> int:
        latent = self.network.config.sample_size
        return (latent if isinstance(latent, int) else latent[0]) * self.scale_factor

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a square picture with that side in pixels.

        Raises:
            BadInput: the side is not a multiple of what this model needs.
        """
        return self.codec.latent_shape(self.size if size is None else size)

    def encode_image(
        self, x: Float[Tensor, "batch 3 height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch channel h w"]:
        """Scaled latents of pictures in [-1, 1]: the posterior's mean, or a ``generator``'s draw."""
        return self.codec.encode(x, generator)

    def posterior(
        self, x: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch channel h w"], Float[Tensor, "batch channel h w"]]:
        """Mean and standard deviation of what `encode_image` draws with a generator."""
        return self.codec.posterior(x)

    def scale_latents(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        """The autoencoder's own latents in the scale in which the network sees them."""
        return self.codec.scale(z)

    def decode_latents(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Pictures in about [-1, 1] (not clipped) of scaled latents, differentiable."""
        return self.codec.decode(z)
