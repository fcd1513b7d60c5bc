"""`Text2Image`: the one adapter through which every method sees a text-to-image model.

M architectures times N methods cost M + N: methods ask this class, never diffusers' internals. It rests on three
organs: an `Anatomy` (the network's parts and how it is called), a `Clock` (the noise process and its times) and a
`Codec` (pictures to latents and back). One subclass per family of pipelines (`sd.py`, `sdxl.py`, `sd3.py`, ...) chooses
them and says how what its text encoders give is joined; all else is here and in the modules beside it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.data import world
from sfumato.errors import BadInput
from sfumato.noise import GaussianProcess
from sfumato.noise.process import Prediction

from . import adapter, attention, lora, sampling, saving, sharing, steering, tokens
from .anatomy import Anatomy, Projection, Site, UNetAnatomy
from .clock import Clock, TableClock
from .codec import Codec
from .conditioning import Conditioning
from .contract import Model
from .denoise import NetworkDenoiser
from .prompts import Prompts

if TYPE_CHECKING:
    pass


class Text2Image(Prompts, Model):
    """A diffusers text-to-image pipeline as methods see it. Make one with `load` or `wrap`.

    The weights are frozen (``requires_grad`` False) and in evaluation mode; what a method trains is a `copy`
    that owns the parameters in question. Calling it, ``p(prompt)``, runs the diffusers pipeline itself.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    """The family's name in sentences."""
    default_cfg_scale: ClassVar[float]
    anatomy_type: ClassVar[type[Anatomy]] = UNetAnatomy

    def __init__(self, pipe, defaults: dict[str, Any] | None = None):
        self.pipe = pipe
        self.defaults = {"cfg_scale": self.default_cfg_scale, **(defaults or {})}
        self.adapters: dict[str, adapter.Adapter] = {}
        self.learned: list[tokens.LearnedToken] = []
        self.listeners: list[Any] = []
        self.anatomy = self._make_anatomy()
        self.companions: list[Callable[[Path], None]] = []
        self.origin: str | None = None
        """The embedded model that this pipeline is or was made from, where it is known to be."""
        for part in self.parts().values():
            part.requires_grad_(False).eval()
        self.clock = self._make_clock()
        self.denoiser = NetworkDenoiser(self)

    def __call__(self, *args, **kwargs):
        """Run the diffusers pipeline: ``p("a red star").images[0]``."""
        return self.pipe(*args, **kwargs)

    @classmethod
    @abstractmethod
    def plain(cls, pipe) -> bool:
        """Whether a pipeline of this family makes pictures from noise and a text alone, as this adapter calls it."""

    def _make_anatomy(self) -> Anatomy:
        return self.anatomy_type(getattr(self.pipe, self.anatomy_type.component))

    def _make_clock(self) -> Clock:
        return TableClock.of(self.pipe.scheduler)

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
    def cleanest(self) -> float:
        return self.clock.time(0)

    @property
    def control(self) -> nn.Module | None:
        """The pipeline's ControlNet, in the pipelines that `wrap` takes as ``controlled``."""
        return getattr(self.pipe, "controlnet", None)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

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

    # Text (and `Prompts`)

    @property
    def vocabulary(self) -> Mapping[str, tuple[str, ...]]:
        """The words of the world that it was trained on, by attribute; empty for models of the world at large."""
        return world.vocabulary(self.tokenizers[0])

    def add_token(self, word: str, init_word: str, vectors: int = 1) -> tokens.LearnedToken:
        """A new word to be learned: ``with p.add_token("<x>", "star") as token: ...``.

        Inside the block prompts may use the word, and ``encode(..., grad=True)`` differentiates to its rows.
        SDXL's pooled embedding is right here too, whatever the checkpoint's configured end token; diffusers'
        own is not.

        Args:
            word: without spaces, not yet a word of the model.
            init_word: the rows start as the mean of this text's token embeddings.
            vectors: tokens that the word stands for.

        Raises:
            BadInput: a word that cannot be one or exists already; more tokens than the context holds.
        """
        return tokens.new_token(self, word, init_word, vectors)

    def call(
        self, z: Float[Tensor, "batch channel height width"], t: Float[Tensor, "..."] | float, cond: Conditioning
    ) -> Float[Tensor, "batch channel height width"]:
        n, step = len(z), self.clock.number(t).reshape(-1).to(z.device)
        if step.numel() not in (1, n):
            raise ValueError(f"{step.numel()} times for {n} pictures: this network takes one time per picture")
        if len(cond) < n:
            cond = cond.map(lambda x: x.expand(n, *x.shape[1:]))
        return self.clock.native(self.anatomy.call(z, step.expand(n), cond))

    # Adapters

    def add_adapter(
        self,
        name: str,
        rank: int = 1,
        alpha: float = 1.0,
        targets: str | Sequence[str] = "transformer",
        generator: torch.Generator | None = None,
    ) -> adapter.Adapter:
        """Attach a fresh low-rank adapter, which acts from now on and changes nothing yet; see `Adapter`.

        Args:
            name: a new name, under which `adapters` lists it.
            rank: of the product, at least 1.
            alpha: the product is scaled by alpha / rank.
            targets: "transformer" (every linear layer and convolution inside the transformer blocks), or
                kinds of attention projections as in `projections`.
            generator: for the initial down factors (CPU).

        Raises:
            BadInput: the name is taken, or an unknown target.
        """
        if name in self.adapters:
            raise BadInput(f"there is already an adapter {name!r}: remove it, or choose another name")
        made = adapter.Adapter(self.anatomy, rank, alpha, targets, generator, owner=self)
        self.adapters[name] = made
        return made

    def load_adapter(self, name: str, path: str | Path) -> adapter.Adapter:
        """Attach an adapter from a LoRA file for attention or transformer layers, of either spelling.

        Raises:
            BadInput: the name is taken, the file cannot be read, or it does not fit this network.
        """
        state, rank, alpha = lora.read(path, self.anatomy)
        made = self.add_adapter(name, rank, alpha, sorted({key.rsplit(".", 1)[0] for key in state}))
        try:
            made.load_state_dict(state)
        except BadInput:
            made.remove()
            raise
        return made

    # Attention and features

    def record_attention(
        self,
        kind: str | None = "cross",
        where: Callable[[Site], bool] = lambda site: True,
        keep: int | None = 1,
    ) -> AbstractContextManager[attention.AttentionRecord]:
        """Record attention probabilities: ``with p.record_attention() as seen: ...; seen.maps``.

        Args:
            kind: "cross", "self", "joint", or None for all.
            where: which layers, e.g. ``lambda site: site.resolution <= 16``.
            keep: how many of the latest network calls to keep; None for all (this can take much memory).
        """
        return attention.record(self, kind, where, keep)

    def edit_attention(
        self,
        function: Callable[..., Any],
        kind: str | None = "cross",
        where: Callable[[Site], bool] = lambda site: True,
        stage: attention.Stage = "probs",
    ) -> AbstractContextManager[None]:
        """Change attention inside a block, differentiably; the network is exactly restored on exit.

        Args:
            function: gets the site and, by ``stage``, the probabilities or the logits, shaped (batch, heads,
                queries, keys), or key and value, shaped (batch, heads, keys, width); returns what takes their
                place. The number of keys may change. With guidance ``site.rows`` tells which rows of the batch are
                conditional, whoever calls the network; ``site.step`` is the sampling step, and in joint
                attention the first ``site.text`` queries and keys are the text's.
            kind: "cross", "self", "joint", or None for all.
            where: which layers.
            stage: "probs" (after softmax), "logits" (before) or "kv".

        Raises:
            BadInput: unknown kind or stage (on entering).
        """
        return attention.edit(self, function, kind, where, stage)

    def tap(
        self, where: str = "bottleneck", function: Callable[[Any], Any] | None = None
    ) -> AbstractContextManager[attention.Tap]:
        """Read, and with ``function`` replace, features: ``with p.tap("bottleneck") as h: ...; h.value``.

        Args:
            where: "bottleneck" (the output of the middle block), or the name of any module of the network.
            function: maps the module's output (of a block with two streams: text and picture) to what takes its place.

        Raises:
            BadInput: no such place (on entering).
        """
        return attention.tap(self, where, function)

    def intercept(
        self, interceptor: steering.Interceptor, place: steering.Place = "prediction"
    ) -> AbstractContextManager[None]:
        """Stand between pipeline and network while it samples; see `sfumato.pipeline.steering`.

        Args:
            place: what it changes, which decides the order in which several act: "features" (one at a time,
                or `BadInput` on entering) inside "prediction".
        """
        return steering.intercept(self, interceptor, place)

    @property
    def patches(self) -> tuple[Any, ...]:
        """The patches that act on this pipeline's network at the moment."""
        steered = steering.of(self.network)
        return tuple(steered.patches) if steered else ()

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
        return self.codec.latent_shape(size or self.size)

    def encode_image(
        self, x: Float[Tensor, "batch 3 height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch channel h w"]:
        """Scaled latents of pictures in [-1, 1]: the posterior's mean, or a ``generator``'s draw."""
        return self.codec.encode(x, generator)

    def scale_latents(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        """The autoencoder's own latents in the scale in which the network sees them."""
        return self.codec.scale(z)

    def decode_latents(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Pictures in about [-1, 1] (not clipped) of scaled latents, differentiable."""
        return self.codec.decode(z)

    draw = sampling.draw
    invert = sampling.invert
    trajectory = sampling.trajectory
    states = sampling.states

    # Copies and files

    def copy(self, own: str | Iterable[str] | None = None) -> Text2Image:
        """A new pipeline that shares every weight with this one except those it owns.

        Training or editing the owned ones never touches this pipeline. Adapters, patches, attention edits and
        learned tokens that are active here do not travel along.

        Args:
            own: None (share everything); "all" (every weight of every part); a subset as in `parameters`; or
                names of parameters: of the network ("mid_block. ...") or of another part ("text_encoder.
                ...").

        Raises:
            BadInput: unknown subset or name.
        """
        return sharing.copy(self, own)

    def merged(self) -> Text2Image:
        """A new pipeline, without adapters, that owns the weights with all attached ones added in.

        Each at its ``scale``; one with a gate (whose strength depends on the prompt) at strength 1.
        """
        return adapter.merged(self)

    def save(
        self, folder: str | Path, overwrite: bool = False, provenance: dict[str, Any] | None = None
    ) -> Path:
        """Write a diffusers folder that loads without this package; see `sfumato.pipeline.saving.save`."""
        return saving.save(self, folder, overwrite, provenance or {})

    def describe(self, weights: bool = True) -> dict[str, Any]:
        """Family, prediction type, schedule, sizes, parameter counts, and a SHA-256 over the ``weights``."""
        return saving.describe(self, weights)
