"""`Text2Image`: the one adapter through which every method sees a text-to-image model.

M architectures times N methods cost M + N: methods ask this class, never diffusers' internals. One subclass
per family of pipelines (`sd.py`: SD 1.x/2.x; `sdxl.py`: SDXL) says how prompts are encoded and what else the
network is told; everything else is here and in the modules beside it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from . import adapter, attention, lora, sampling, saving, sharing, steering, tokens
from .anatomy import Anatomy, Projection, Site, UNetAnatomy
from .conditioning import Conditioning
from .denoise import NetworkDenoiser


class Text2Image(ABC):
    """A diffusers text-to-image pipeline as methods see it. Make one with `load` or `wrap`.

    The weights are frozen (``requires_grad`` False) and in evaluation mode; what a method trains is a `copy`
    that owns the parameters in question. Calling it, ``p(prompt)``, runs the diffusers pipeline itself.
    """

    family: ClassVar[str]
    default_cfg_scale: ClassVar[float]
    anatomy_type: ClassVar[type[Anatomy]] = UNetAnatomy

    def __init__(self, pipe, defaults: dict[str, Any] | None = None):
        self.pipe = pipe
        self.defaults = {"cfg_scale": self.default_cfg_scale, **(defaults or {})}
        self.adapters: dict[str, adapter.Adapter] = {}
        self.learned: list[tokens.LearnedToken] = []
        self.listeners: list[Any] = []
        self.anatomy = self.anatomy_type(getattr(pipe, self.anatomy_type.component))
        self.companions: list[Callable[[Path], None]] = []
        for part in self.parts().values():
            part.requires_grad_(False).eval()
        self.denoiser = NetworkDenoiser(self)

    def __call__(self, *args, **kwargs):
        """Run the diffusers pipeline: ``p("a red star").images[0]``."""
        return self.pipe(*args, **kwargs)

    # What it is made of

    @property
    def network(self) -> nn.Module:
        """The denoising network."""
        return self.anatomy.network

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

    @abstractmethod
    def text_parts(self) -> list[tuple[str, str]]:
        """(tokenizer, text encoder) as component names, in the order in which their embeddings are joined."""

    @property
    def tokenizers(self) -> list:
        """The tokenizers, one for each text encoder, in the order of `text_parts`."""
        return [getattr(self.pipe, name) for name, _ in self.text_parts()]

    def projections(self, *kinds: str) -> list[Projection]:
        """The attention projections of the given kinds, in network order; all of them if none is given.

        Args:
            kinds: any of "cross.q", "cross.k", "cross.v", "cross.out", "self.q", "self.k", "self.v",
                "self.out".

        Raises:
            BadInput: unknown kind.
        """
        return self.anatomy.projections(kinds)

    def parameters(self, subset: str = "full") -> dict[str, nn.Parameter]:
        """The network's parameters by name, in one vocabulary for all methods.

        Args:
            subset: "full"; "xattn" (all of cross-attention); "xattn-strict" (its key and value projections);
                "noxattn" (all but cross-attention, the time embedding and the output block); "selfattn".

        Raises:
            BadInput: unknown subset, or one that selects nothing in this network.
        """
        return self.anatomy.parameters(subset)

    # Text

    @property
    def context_length(self) -> int:
        """How many tokens a prompt may have, start and end tokens included."""
        return min(
            min(
                getattr(self.pipe, tok).model_max_length,
                getattr(self.pipe, enc).config.max_position_embeddings,
            )
            for tok, enc in self.text_parts()
        )

    def encode(
        self, prompts: str | Sequence[str], grad: bool = False, size: int | None = None
    ) -> Conditioning:
        """Encode prompts as the pipeline itself would.

        Args:
            prompts: one or several texts; "" is the empty prompt.
            grad: keep the graph (for learned tokens and attacks on the text side).
            size: side in pixels told to networks with size conditioning (SDXL); default `size`.

        Warns:
            UserWarning: a prompt is longer than the context; the warning names what is cut off.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise BadInput('no prompt was given: give at least one, "" for the empty prompt')
        ids, mask = zip(*(self._tokenize(tok, prompts) for tok, _ in self.text_parts()), strict=True)
        with torch.set_grad_enabled(grad):
            encoded = self._encode_ids(list(ids), mask[0], size or self.size)
        return encoded.replace(prompts=tuple(prompts))

    @abstractmethod
    def _encode_ids(self, ids: list[Tensor], mask: Tensor, size: int) -> Conditioning:
        """The conditioning for token ids, one tensor per text encoder."""

    def _tokenize(self, name: str, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokenizer, length = getattr(self.pipe, name), self.context_length
        prompts = self.pipe.maybe_convert_prompt(prompts, tokenizer)  # words learned as several tokens
        for ids in tokenizer(prompts).input_ids:
            if len(ids) > length:
                rest = tokenizer.decode(ids[length - 1 : -1]).strip()
                message = f"the prompt has {len(ids)} tokens, the model reads {length}; cut off: {rest!r}"
                warnings.warn(message, stacklevel=4)
        out = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return out.input_ids.to(self.device), out.attention_mask.to(self.device)

    def last_word_token(self, cond: Conditioning) -> Tensor:
        """Index of the last word's last token in each row (0, the start token, for the empty prompt)."""
        return cond.mask.sum(dim=1) - 2

    def unconditional(
        self, n: int = 1, negative: str | Conditioning | None = None, size: int | None = None
    ) -> Conditioning:
        """What guidance steers away from: ``negative``, or what the pipeline takes when none is given."""
        cond = negative if isinstance(negative, Conditioning) else self.encode(negative or "", size=size)
        return cond.repeat(n) if len(cond) == 1 else cond

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
            function: maps the module's output to what takes its place.

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
    def scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def size(self) -> int:
        """Side of a picture in pixels, unless another is asked for."""
        latent = self.network.config.sample_size
        return (latent if isinstance(latent, int) else latent[0]) * self.scale_factor

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a square picture with that side in pixels.

        Raises:
            BadInput: the side is not a multiple of `scale_factor`.
        """
        size = size or self.size
        if size <= 0 or size % self.scale_factor:
            raise BadInput(
                f"size {size} is not a multiple of {self.scale_factor} pixels, as this model needs"
            )
        side = size // self.scale_factor
        return self.network.config.in_channels, side, side

    def encode_image(
        self, x: Float[Tensor, "batch 3 height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch channel h w"]:
        """Scaled latents of pictures in [-1, 1]: the posterior's mean, or a ``generator``'s draw."""
        vae = self.pipe.vae
        posterior = vae.encode(x.to(vae.dtype)).latent_dist
        z = posterior.mode() if generator is None else posterior.sample(generator=generator)
        return self.scale_latents(z).to(x.dtype)

    def scale_latents(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        """The autoencoder's own latents in the scale in which the network sees them."""
        mean, std = self._latent_statistics(z)
        return (z - mean) / std * self.pipe.vae.config.scaling_factor

    def decode_latents(self, z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Pictures in about [-1, 1] (not clipped) of scaled latents, differentiable."""
        vae = self.pipe.vae
        mean, std = self._latent_statistics(z)
        latent = z / vae.config.scaling_factor * std + mean
        return vae.decode(latent.to(vae.dtype), return_dict=False)[0].to(z.dtype)

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return like.new_zeros(()), like.new_ones(())
        return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)

    sample = sampling.sample
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

    def frozen_copy(self) -> Text2Image:
        """``copy(own=None)``: the same weights, for losses that compare with the original."""
        return self.copy()

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
