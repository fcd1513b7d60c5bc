"""OmniGen: one network that reads an instruction with pictures in it and draws the next picture (arXiv:2409.11340)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from sfumato.data.base import to_image
from sfumato.errors import BadInput

from . import steering
from .anatomy.interleaved import OmniGenAnatomy
from .base import Text2Image
from .clock import Clock, FlowClock
from .codec import Codec
from .conditioning import Conditioning, Role
from .interleaved import (
    AFTER,
    BEFORE,
    Instruction,
    Interleaved,
    build_sequence,
    fitted,
    only_pictures,
    place,
    places,
    tokens_of,
)

_LONGEST = 131_072
_STEP = 64
"""Tokens."""


@dataclass(frozen=True)
class RisingClock(FlowClock):
    """The clock of a network that is told how much of the picture there is: 0 of noise, 1 of the picture itself."""

    def counting(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return falling(config)


def falling(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration with its noise falling from 1, in which all else here counts, not rising to it."""
    return {**{k: v for k, v in config.items() if k != "invert_sigmas"}, "num_train_timesteps": 1000}


class OmniGen(Text2Image):
    """The adapter for ``OmniGenPipeline``.

    It is asked with a text, or with an `Instruction`: a text with places for pictures, and the pictures. Guidance on
    an instruction with pictures has three branches, v = v_u + s_I (v_i - v_u) + s_T (v_c - v_i), where u is what is
    steered away from, i the pictures alone and c all of it; ``cfg_scale`` is s_T and ``image_cfg_scale`` of
    `defaults`, at first 1.6, is s_I. What is steered away from is ``negative`` of `defaults`, or else the long list of
    flaws of the pipeline's own call; training put `sfumato.pipeline.interleaved.DROPPED` in the place of instructions.

    A conditioning's tokens are rows of the network's table of words; pictures' rows are made in the network. There is
    no text encoder: words cannot be learned for it, and what searches for words searches in that table.

    Differs from diffusers' own call: input pictures are their latents' means, not draws; every row of a batch has the
    rotary positions of its own (there a row whose padding is not the first one's is turned wrongly).
    """

    family = "omnigen"
    title = "OmniGen"
    default_cfg_scale = 2.5
    closed = False
    told_by = "check_inputs"
    guides = True
    conditional_first = True
    padding = "longest"
    masked = True
    anatomy: OmniGenAnatomy
    remember: bool = False
    """Whether a draw keeps keys and values of text and input pictures: memory for time, and other last bits."""

    def __init__(self, pipe, defaults: dict[str, Any] | None = None):
        super().__init__(pipe, {"image_cfg_scale": 1.6, **(defaults or {})})
        self._usual: int | None = None

    @classmethod
    def plain(cls, pipe) -> bool:
        return pipe.transformer.config.in_channels == pipe.vae.config.latent_channels

    @classmethod
    def pipelines(cls, name: str) -> Any:
        return pipeline_class()

    def _make_anatomy(self) -> OmniGenAnatomy:
        bidirectional = self.defaults.get("bidirectional", True)
        return OmniGenAnatomy(self.pipe.transformer, self.size // self.scale_factor, bidirectional)

    def _make_clock(self) -> Clock:
        scheduler = self.pipe.scheduler
        solver = type(scheduler).from_config(falling(scheduler.config))
        return RisingClock.of(solver, scale=1.0, even=True, backward=True, negated=True)

    @property
    def codec(self) -> Codec:
        return Codec(self.pipe.vae, multiple=2)

    def _size(self) -> int:
        return self.pipe.default_sample_size * self.scale_factor

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        shape = super().latent_shape(size)
        config = self.network.config
        if shape[-1] // config.patch_size > config.pos_embed_max_size:
            most = config.pos_embed_max_size * config.patch_size * self.scale_factor
            raise BadInput(f"size {size or self.size} is more than this model has places for: draw {most} at most")
        return shape

    def text_parts(self) -> list[tuple[str, str]]:
        return []

    @property
    def tokenizers(self) -> list:
        return [self.pipe.tokenizer]

    @property
    def word_tables(self) -> list[Float[Tensor, "words width"]]:
        return [self.network.embed_tokens.weight.detach()]

    def text_lengths(self) -> list[int]:
        return [min(self.pipe.tokenizer.model_max_length, _LONGEST)]

    def _texts(self, prompts: list[str]) -> list[str]:
        return [f"{BEFORE}{prompt}{AFTER}" for prompt in prompts]

    def _phrase(self, phrase: str) -> str:
        return phrase

    def _encode(self, reads: Any, size: int) -> Conditioning:
        raise BadInput("OmniGen is asked with texts and pictures: use encode, and edit the tokens of what it gives")

    def encode(
        self, prompts: str | Instruction | Sequence[str | Instruction], grad: bool = False, size: int | None = None
    ) -> Interleaved:
        """Texts, or instructions with their pictures, as the network reads them; see `Prompts.encode`.

        Args:
            size: the longest side that an input picture keeps; default `size`.

        Raises:
            BadInput: a place without its picture, a picture without a place, or no picture.
        """
        several = [prompts] if isinstance(prompts, str | Instruction) else list(prompts)
        if not several:
            raise BadInput('no prompt was given: give at least one, "" for the empty prompt')
        asked = [x if isinstance(x, Instruction) else Instruction(x) for x in several]
        for x in asked:
            places(x.text, len(x.pictures))  # before pictures are read
            self.require_short(x.text)
        latents = [[self.latent_of(picture, size) for picture in x.pictures] for x in asked]
        return self.interleaved([x.text for x in asked], latents, grad)

    def require_short(self, text: str) -> None:
        """Refuse an instruction of more tokens than the vocabulary's longest.

        Raises:
            BadInput: says how many it has.
        """
        most, long = self.pipe.tokenizer.model_max_length, len(self.pipe.tokenizer(text).input_ids)
        if long > most:
            raise BadInput(f"the instruction {text[:40]!r}... has {long} tokens, of {most} at most: shorten it")

    def latent_of(self, picture: Any, size: int | None = None) -> Float[Tensor, "channel h w"]:
        """The latent of an input picture: a file, a PIL image or an 8-bit array."""
        image = picture if isinstance(picture, Image.Image) else to_image(picture)
        pixels = np.asarray(fitted(image.convert("RGB"), size or self.size, 2 * self.scale_factor))
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(self.device).float() / 127.5 - 1
        with torch.no_grad():
            return self.encode_image(x)[0]

    def interleaved(
        self, texts: Sequence[str], latents: Sequence[Sequence[Float[Tensor, "channel h w"]]], grad: bool = False
    ) -> Interleaved:
        """Instructions with the latents of their pictures, as the network reads them.

        Padded to a length that most of them share, so that methods may mix what was encoded apart.
        """
        cond = self._common(self.sequence(texts, latents, grad))
        if not any(latents):
            return cond
        wordless = self._common(self.sequence([only_pictures(len(some)) for some in latents], latents, grad))
        scale = torch.full((len(texts),), float(self.defaults["image_cfg_scale"]))
        return cond.replace(wordless=wordless, image_scale=scale)

    def _common(self, cond: Interleaved) -> Interleaved:
        """Padded to whole `_STEP`s, at least those of what is steered away from."""
        if self._usual is None:
            said = self.defaults.get("negative")
            self._usual = len(tokens_of(flaws() if said is None else said, [], self.pipe.tokenizer)[0])
        return cond.longer(-(-max(self._usual, cond.ids.shape[1]) // _STEP) * _STEP)

    def sequence(
        self, texts: Sequence[str], latents: Sequence[Sequence[Float[Tensor, "channel h w"]]], grad: bool = False
    ) -> Interleaved:
        """`interleaved` for no more than a call of the network: without what guidance on pictures needs."""
        patch = self.network.config.patch_size ** 2
        counts = [[x.shape[-2] * x.shape[-1] // patch for x in some] for some in latents]
        made = build_sequence(texts, counts, [0] * len(texts), self.pipe.tokenizer)
        ids, left = made.ids.to(self.device), (~made.mask).sum(dim=1).tolist()
        with torch.set_grad_enabled(grad):
            tokens = self.network.embed_tokens(ids)
        order = [places(text, len(some)) for text, some in zip(texts, latents, strict=True)]
        return Interleaved(
            tokens,
            ids,
            made.mask.to(self.device),
            roles=self._roles(made.ids, made.mask).to(self.device),
            prompts=tuple(texts),
            latents=tuple(tuple(some[i] for i in rows) for some, rows in zip(latents, order, strict=True)),
            spans=tuple(tuple((a - q, b - q) for a, b in some) for some, q in zip(made.spans, left, strict=True)),
        )

    def _roles(self, ids: Int[Tensor, "batch length"], mask: Tensor) -> Int[Tensor, "batch length"]:
        """The frame of every instruction as start and end."""
        roles = torch.where(mask, int(Role.WORD), int(Role.PADDING))
        first = len(self.pipe.tokenizer(BEFORE).input_ids)
        last = len(self.pipe.tokenizer(AFTER, add_special_tokens=False).input_ids)
        place = mask.long().cumsum(dim=1)
        roles[mask & (place <= first)] = int(Role.START)
        roles[:, ids.shape[1] - last :] = int(Role.END)
        return roles

    def draw(self, *args: Any, **settings: Any) -> Float[Tensor, "n 3 height width"]:
        """See `Model.draw`; with ``remember`` (an attribute) text and input pictures are read once for all steps."""
        with ExitStack() as stack:
            if self.remember and not settings.get("grad") and steering.of(self.network) is None:
                stack.enter_context(self.anatomy.remembering())
            return super().draw(*args, **settings)

    def last_word_token(self, cond: Conditioning) -> Tensor:
        return (cond.roles == Role.END).long().argmax(dim=1) - 1

    def asking(self, words: Sequence[str], pictures: Sequence[Path]) -> list[Any]:
        if not words:
            raise BadInput(
                "OmniGen is told what to do with pictures: give a prompt with a place for each, as in "
                f'"{place(1)} in red" --image a.png'
            )
        return [Instruction(word, tuple(pictures)) for word in words] if pictures else list(words)

    def unconditional(
        self, n: int = 1, negative: str | Conditioning | None = None, size: int | None = None
    ) -> Conditioning:
        said = self.defaults.get("negative") if negative is None else negative
        return super().unconditional(n, flaws() if said is None else said, size)


def pipeline_class() -> Any:
    """``OmniGenPipeline``, usable without torchvision too, of which it wants four lines of preparing pictures."""
    from diffusers import OmniGenPipeline
    from diffusers.pipelines.omnigen import pipeline_omnigen as home
    from diffusers.pipelines.omnigen import processor_omnigen as processor

    if not hasattr(home, "OmniGenMultiModalProcessor"):
        steps = {"Compose": _Compose, "Lambda": lambda f: f, "ToTensor": _to_tensor, "Normalize": _normal}
        processor.transforms = SimpleNamespace(**steps)
        home.OmniGenMultiModalProcessor = processor.OmniGenMultiModalProcessor
    return OmniGenPipeline


def flaws() -> str:
    """What the pipeline's own call steers away from."""
    pipeline_class()
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor

    return inspect.signature(OmniGenMultiModalProcessor.__call__).parameters["negative_prompt"].default


class _Compose:
    def __init__(self, steps: Sequence[Any]):
        self.steps = steps

    def __call__(self, x: Any) -> Any:
        for step in self.steps:
            x = step(x)
        return x


def _to_tensor() -> Any:
    return lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _normal(mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> Any:
    at = lambda values: torch.tensor(values)[:, None, None]
    return lambda x: (x - at(mean)) / at(std)
