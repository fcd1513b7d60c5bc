"""DreamCreature: parts found in pictures without supervision, a word for each variant of each, mixed in prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sfumato.data.templates import PUBLISHED
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative
from sfumato.noise.process import compose
from sfumato.pipeline import Text2Image
from sfumato.pipeline.customization import Customization, add_words
from sfumato.pipeline.tokens import standing_in
from sfumato.train.draw import uniform
from sfumato.train.words import encode_once

from .base import OneWord
from .parts.features import patches
from .parts.learning import Drawn, Given, Learning
from .parts.maps import averaged, nearest_resolution, square_side
from .parts.parts import PartDictionary, TokenMapper, discover, part_loss
from .parts.products import factors, on_attention, products_of


def snr_weights(snr: Float[Tensor, "batch"], prediction: str, gamma: float = 5.0) -> Float[Tensor, "batch"]:
    """What makes a native error count as min(SNR, gamma) times that of x0; 1 everywhere for gamma 0.

    eps: min(SNR, gamma) / SNR, 1 where there is no signal; v: / (SNR + 1); x0: as it is; flow: sigma^2 times as much,
    for the error of x0 is sigma times the flow's, whose alpha + sigma = 1. For v the published code has
    min(SNR + 1, gamma) / (SNR + 1), which is no such weight of the error of x0.
    """
    if not gamma:
        return torch.ones_like(snr)
    if prediction == "eps":
        return (gamma / snr).clamp(max=1)
    least = snr.clamp(max=gamma)
    if prediction == "v":
        return least / (snr + 1)
    return least / (1 + snr.sqrt()).square() if prediction == "flow" else least


@dataclass(frozen=True, kw_only=True)
class DreamCreature(OneWord):
    """Learns a word for every variant of every part of what many pictures of one kind show.

    arXiv:2311.15477 (and PartCraft, arXiv:2407.04604). Patches of an encoder's features are told apart by k-means:
    foreground, ``parts`` parts, ``variants`` variants of each. A picture is then said by its parts, in random order, as
    ``<2:17> <4:0>``; their embeddings come from a table through a small network (`TokenMapper`) and are learned with
    low-rank products on attention. `part_loss` pulls each part's attention, normalised across parts, onto its patches.
    Prompts may mix parts of several pictures. Cost: ``updates`` forward and backward passes of the network, with
    attention computed in the open at one resolution.

    Differs from the paper: parts that have no word in the prompt do not count in the attention loss, unless
    ``said_only=False`` counts them as the published code does; pictures are mirrored but not cropped at random; class
    labels in place of variants are not taken; which cluster is the foreground is decided without an eye; the denoising
    loss counts everywhere (the published ``masked_training`` is not here), and parts have numbers, no names. Features
    are those of ``encoder``, DINOv2 in the paper; without one, those of the package's own small network for the sketch
    world, which knows other pictures badly. They are always of the whole picture, as masks are in the paper; its
    codebooks are made of centre crops.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **OneWord.EXAMPLE, "lr": 0.01, "parts": 2, "variants": 2, "rank": 2, "templates": ("{}",),
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd": {}, "sdxl": {"layers": 1, "attention_weight": 0.1},
        "sketch": {
            "updates": 400, "lr": 1e-3, "batch": 4, "parts": 3, "variants": 16, "flip": 0.0, "templates": ("{}",),
            "sample_posterior": False,
        },
    }  # fmt: skip
    """Settings by name: those of the published scripts for SD 1.5 (the defaults) and SDXL, and some for models as small
    as the embedded one, not tuned."""

    updates: Natural = 74_900
    batch: Count = 8
    """Pictures (each with its noise, time and text) in an update."""
    weight_decay: NotNegative = 1e-2
    clip_norm: NotNegative = 1.0
    word: str = "<>"
    """What stands before PART:VARIANT in the new words: <> gives <2:17>, <bird-> gives <bird-2:17>."""
    templates: tuple[str, ...] = ()
    """Phrases with {} where the parts stand; by default none for half of the pictures, else the published ones."""
    parts: Count = 8
    """M: parts, the background among them."""
    variants: Count = 256
    """K: variants of a part; at most a quarter of the pictures."""
    encoder: str = ""
    """A folder or hub id of a vision transformer whose patch features tell parts apart, such as DINOv2's; empty: the
    package's own network for the sketch world."""
    dictionary: str = ""
    """A file of parts found before (`PartDictionary.save`); empty: they are found in the pictures."""
    layers: Natural = 3
    """Layers between a part's row and its embedding."""
    rank: Count = 4
    """Rank of each product."""
    attention_weight: NotNegative = 0.01
    """lambda: weight of the attention loss."""
    said_only: bool = True
    """Count in the attention loss only parts with a word in the prompt."""
    snr_gamma: NotNegative = 5.0
    """Loss weights min(SNR, gamma) / SNR, for other predictions than eps as `snr_weights` has them; 0: none."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.named(0, 0),)

    def named(self, part: int, variant: int) -> str:
        """The word of a variant."""
        end = ">" if self.word.endswith(">") else ""
        return f"{self.word.removesuffix('>')}{part}:{variant}{end}"

    @property
    def tokens_needed(self) -> int:
        return self.parts

    def texts(self, pipe: Text2Image, prompts: Sequence[str]) -> list[list[str]]:
        found = super().texts(pipe, prompts)
        if self.templates:
            return found
        phrases = PUBLISHED[self.kind]
        return [["{}"] * len(phrases) + list(phrases) if some == list(phrases) else some for some in found]

    def check(self, pipe: Text2Image) -> None:
        pipe.anatomy.check_site_kind("cross")

    def found(self, pictures: Float[Tensor, "n 3 height width"]) -> tuple[PartDictionary, Float[Tensor, "n h w width"]]:
        """The parts, and the features of the pictures.

        Raises:
            BadInput: an encoder or a file that cannot be used.
        """
        features = patches(pictures, self.encoder)
        if not self.dictionary:
            return discover(features, self.parts, self.variants, self.seed), features
        made = PartDictionary.load(self.dictionary)
        if made.coarse.shape[1] != features.shape[-1] or len(made.coarse) > self.parts:
            raise BadInput(
                f"{self.dictionary} has {len(made.coarse)} parts of {made.coarse.shape[1]} numbers, not {self.parts} "
                f"of {features.shape[-1]}: take the encoder and the number of parts that it was made with"
            )
        return made, features

    def learned(self, pipe: Text2Image, given: Given, folder: Path | None) -> Customization:
        assert given.pictures is not None
        dictionary, features = self.found(given.pictures)
        views = [features, patches(given.pictures.flip(-1), self.encoder)] if self.flip else [features]
        layers = nearest_resolution(pipe, "cross", 1 / 4)
        codes = torch.stack([dictionary.codes(view) for view in views]).cpu()
        masks = torch.stack([dictionary.masks(view) for view in views]).to(pipe.device)
        M, K = len(dictionary.coarse), dictionary.variants
        present = sorted({(m, k) for m in range(M) for k in codes[..., m].unique().tolist() if k < K})
        words = [self.named(m, k) for m, k in present]
        widths = [table.shape[1] for table in pipe.word_tables]
        blank = {word: tuple(torch.zeros(1, width) for width in widths) for word in words}
        student = add_words(pipe, [Customization(blank)])
        adapter = on_attention(student, self.rank, self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            # One for all text encoders, cut into their parts, as the SDXL script has it.
            mapper = TokenMapper(M, K, sum(widths), self.layers).to(pipe.device)
        part, variant = (torch.tensor(x, device=pipe.device) for x in zip(*present, strict=True))

        def loss(drawn: Drawn, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            order = uniform(len(drawn.z0), rng).tolist()
            own = codes[drawn.mirrored.cpu(), drawn.at.cpu()]
            said = [self.said(text, code, K, o) for text, code, o in zip(drawn.said, own, order, strict=True)]
            with standing_in(student, words[0], mapper(part, variant).split(widths, dim=1)):
                cond = encode_once(student, said)
            process, prediction = student.denoiser.process, student.denoiser.prediction
            alpha, sigma = process.alpha_sigma(drawn.t, drawn.z0)
            target = compose(drawn.z0, drawn.eps, alpha, sigma, prediction)
            with averaged(student, "cross", layers) as seen:
                pred = student.denoiser(alpha * drawn.z0 + sigma * drawn.eps, drawn.t, cond)
            weights = snr_weights((alpha / sigma).square().flatten(), prediction, self.snr_gamma)
            denoising = (weights * (pred - target).square().flatten(1).mean(dim=1)).mean()
            columns = [[student.find(cond[i], self.named(m, k))[0] if k < K else None for m, k in enumerate(code)]
                       for i, code in enumerate(own.tolist())]  # fmt: skip
            maps = torch.stack([self.maps(x, some) for x, some in zip(seen.mean, columns, strict=True)])
            there = (own < K).to(maps.device) if self.said_only else None
            places = masks[drawn.mirrored.to(masks.device), drawn.at.to(masks.device)]
            attention = part_loss(maps, F.interpolate(places, maps.shape[-2:]), there)
            return denoising + self.attention_weight * attention, {"denoising": denoising, "attention": attention}

        modules = {"mapper": mapper, "lora": factors(adapter)}
        recipe = Learning(
            "dreamcreature", student, modules, given, loss, self.flip, self.sample_posterior, partial=True
        )
        losses = self.fit(recipe, folder)
        with torch.no_grad():
            rows = mapper(part, variant).cpu().split(widths, dim=1)
        found = {word: tuple(x[i : i + 1].clone() for x in rows) for i, word in enumerate(words)}
        told = {"losses": losses.get("loss", []), "background": dictionary.background, "codes": codes[0].tolist()}
        return Customization(found, products_of(adapter), about=told)

    def said(self, text: str, code: Int[Tensor, "part"], absent: int, order: float) -> str:
        """A picture's text with the words of its parts in random order."""
        there = [self.named(m, k) for m, k in enumerate(code.tolist()) if k < absent]
        shuffled = torch.randperm(len(there), generator=torch.Generator().manual_seed(int(order * 2**31)))
        return text.replace("{}", " ".join(there[j] for j in shuffled))

    @staticmethod
    def maps(
        attention: Float[Tensor, "cells length"], columns: Sequence[Tensor | None]
    ) -> Float[Tensor, "part side side"]:
        """The attention to each part's word; 0 for a part without one."""
        zero = attention.new_zeros(len(attention))
        each = [zero if c is None else attention[:, c.to(attention.device)].sum(dim=1) for c in columns]
        side = square_side(len(attention))
        return torch.stack(each).view(len(each), side, side)
