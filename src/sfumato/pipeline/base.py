"""`Text2Image`: the one adapter through which every method sees a text-to-image model.

M architectures times N methods cost M + N: methods ask this class, never diffusers' internals. It rests on three
organs (`organs.py`): an `Anatomy` (the network's parts and how it is called), a `Clock` (the noise process and its
times) and a `Codec` (pictures to latents and back). One subclass per family of pipelines (`sd.py`, `sdxl.py`, ...)
chooses them and says how what its text encoders give is joined; all else is here and in the modules beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data import world
from sfumato.errors import BadInput

from . import adapter, attention, conditioning, lora, marking, offload, sampling, saving, sharing, steering, tokens
from . import features as inside
from .anatomy import Site
from .denoise import NetworkDenoiser
from .organs import Organs
from .single import write


class Text2Image(Organs):
    """A diffusers text-to-image pipeline as methods see it. Make one with `load` or `wrap`.

    The weights are frozen (``requires_grad`` False) and in evaluation mode; what a method trains is a `copy`
    that owns the parameters in question. Calling it, ``p(prompt)``, runs the diffusers pipeline itself.
    """

    adapters: dict[str, adapter.Adapter]
    learned: list[tokens.LearnedToken]
    denoiser: NetworkDenoiser

    def __call__(self, *args, **kwargs):
        """Run the diffusers pipeline: ``p("a red star").images[0]``.

        A pipeline that knows subjects whose pictures are to be marked marks each, as `draw` does, and gives no latents.

        Raises:
            BadInput: an ``output_type`` that is no picture, of pictures that are to be marked.
            MarkFailed: a mark was not read back; no picture is returned.
        """
        if "marked" not in self.defaults:
            return self.pipe(*args, **kwargs)
        return marking.called(self.defaults["marked"], self.pipe.__call__, *args, **kwargs)

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
            targets: "transformer" (every linear layer and convolution inside the transformer blocks), kinds of
                attention projections as in `projections`, or layers by name, those of a text encoder with its name
                before it ("text_encoder. ...").
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
        """Attach an adapter from a LoRA file, in any spelling of diffusers, peft, kohya and the web UIs.

        Its layers may be linear ones and convolutions of the network and of the text encoders, of several ranks and
        alphas; those of lower rank are filled up with zeros (see `sfumato.pipeline.lora.uniform`).

        Raises:
            BadInput: the name is taken, the file cannot be read, holds something else than plain products, or does not
                fit this pipeline.
        """
        parts = {self.anatomy.component: self.network}
        parts |= {encoder: self.parts()[encoder] for _, encoder in self.text_parts()}
        state, rank, alpha = lora.uniform(lora.products(path, self.anatomy.component, parts))
        made = self.add_adapter(name, rank, alpha, sorted({key.rsplit(".", 1)[0] for key in state}))
        made.load_state_dict(state)
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

    def features(
        self,
        z: Float[Tensor, "batch channel height width"],
        t: Float[Tensor, "..."] | float,
        cond: conditioning.Conditioning,
        where: str = "bottleneck",
    ) -> Float[Tensor, "batch *features"]:
        """What the network makes of ``z`` at a place inside, as a pure function: for Jacobians, forward and backward.
        In the dtype of ``z``.

        Rows do not depend on each other. The network runs no further than to that place, and its attention without
        fused kernels, which have no derivative in forward mode.

        Args:
            z, t, cond: as for `denoiser`.
            where: as for `tap`; of a block with two streams it is the picture's.

        Raises:
            BadInput: no such place.
        """
        return inside.features(self, z, t, cond, where)

    def continued(
        self,
        h: Float[Tensor, "batch *features"],
        z: Float[Tensor, "channel height width"],
        t: Float[Tensor, "..."] | float,
        cond: conditioning.Conditioning,
        where: str = "bottleneck",
    ) -> Float[Tensor, "batch channel height width"]:
        """The noise that the network predicts in ``z`` if what it makes of it inside is ``h``: the way on from
        `features`, to which all else that leads past that place (a U-Net's skips) stays as ``z`` makes it.

        Raises:
            BadInput: no such place.
        """
        return inside.continued(self, h, z, t, cond, where)

    def intercept(
        self, interceptor: steering.Interceptor, place: steering.Place = "prediction"
    ) -> AbstractContextManager[None]:
        """Stand between pipeline and network while it samples; see `sfumato.pipeline.steering`.

        Args:
            place: what it changes, which decides the order in which several act: "features" (one at a time,
                or `BadInput` on entering) inside "attention", "conditioning" and "prediction".
        """
        return steering.intercept(self, interceptor, place)

    @property
    def patches(self) -> tuple[Any, ...]:
        """The patches that act on this pipeline's network at the moment."""
        steered = steering.of(self.network)
        return tuple(steered.patches) if steered else ()

    # Pictures

    draw = sampling.draw
    invert = sampling.invert
    walk = sampling.walk
    trajectory = sampling.trajectory
    states = sampling.states

    # Room

    def offload(self, how: offload.Offload = "model", device: torch.device | str | None = None) -> Self:
        """Keep the weights in the machine's own memory, and bring them to the accelerator only while they compute.

        It is diffusers' own offloading, turned on in place. "model" has one part (a text encoder, the network, the
        autoencoder) there at a time; copies are offloaded alike, but a network that they own weights of stays.
        "sequential" has one layer there at a time, which is slow, and leaves a pipeline that can draw only: it cannot
        be copied, edited, attacked or saved.

        Args:
            device: the accelerator; by default the one of this machine.

        Returns:
            This pipeline.

        Raises:
            BadInput: there is no accelerator, or an unknown ``how``.
        """
        offload.begin(self.pipe, how, offload.accelerator(device))
        return self

    # Copies and files

    def copy(self, own: str | Iterable[str] | None = None) -> Self:
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

    def merged(self) -> Self:
        """A new pipeline, without adapters, that owns the weights with all attached ones added in.

        Each at its ``scale``; one with a gate (whose strength depends on the prompt) at strength 1.
        """
        return adapter.merged(self)

    def save(
        self, folder: str | Path, overwrite: bool = False, provenance: dict[str, Any] | None = None
    ) -> Path:
        """Write a diffusers folder that loads without this package; see `sfumato.pipeline.saving.save`."""
        return saving.save(self, folder, overwrite, provenance or {})

    def save_file(
        self, path: str | Path, overwrite: bool = False, provenance: dict[str, Any] | None = None
    ) -> list[str]:
        """Write one file of the original layout, if the family has one; see `sfumato.pipeline.single.write.write`."""
        return write.write(self, path, overwrite, provenance)

    def describe(self, weights: bool = True) -> dict[str, Any]:
        """Family, prediction type, schedule, sizes, parameter counts, and a SHA-256 over the ``weights``."""
        return saving.describe(self, weights)
