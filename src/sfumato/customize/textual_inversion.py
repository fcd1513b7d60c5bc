"""Textual inversion: a new word whose embedding is learned from a few pictures (arXiv:2208.01618)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.fields import Count, Natural, NotNegative, Positive
from sfumato.pipeline import Text2Image
from sfumato.pipeline.customization import Customization
from sfumato.train.recipe import Loose
from sfumato.train.words import denoising_loss, encode_once

from .base import SKETCH, OneWord
from .parts.learning import Drawn, Given, Learning


@dataclass(frozen=True, kw_only=True)
class TextualInversion(OneWord):
    """Learns the embedding of a new word, with everything else frozen.

    Minimises eq. 2 of arXiv:2208.01618 over the new rows alone,

        E_{x, template, eps, t} || target(x, eps) - network(x_t, t, E(template with v*)) ||^2,

    as a mean over all elements, in the network's native prediction (eps in the paper), t uniform over the timesteps.
    With several text encoders each has rows of its own. Cost: ``updates`` forward and backward passes of network and
    text encoders, without gradients of any weight.

    Differs from the paper: gradients are taken for the new rows only instead of restoring all others after each
    step, which is the same update; several vectors a word are the paper's own extension (its appendix). The preset of
    the embedded model has phrases of that model's words.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {}, "sketch": {"updates": 200, "lr": 0.02, "batch": 8, **SKETCH},
    }  # fmt: skip
    """Settings by name: the paper's (which are the defaults), and some for models as small as the embedded one."""

    updates: Natural = 5000
    batch: Count = 8
    """Pictures (each with its noise, time and text) in an update."""
    lr: Positive = 0.04
    """Learning rate of AdamW: the paper's 0.005 times its batch of 8 (4 on each of 2 devices)."""
    weight_decay: NotNegative = 1e-2
    """Decoupled weight decay of AdamW, on the new rows only."""
    tokens: Count = 1
    """Tokens that together are the new word."""

    @property
    def tokens_needed(self) -> int:
        return self.tokens

    def learned(self, pipe: Text2Image, given: Given, folder: Path | None) -> Customization:
        token = pipe.add_token(self.word, self.start(pipe), self.tokens)

        def loss(drawn: Drawn, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            cond = encode_once(pipe, [text.replace("{}", self.word) for text in drawn.said])
            return denoising_loss(pipe, drawn.z0, drawn.t, drawn.eps, cond), {}

        modules = {"word": Loose(token.parameters())}
        recipe = Learning("textual-inversion", pipe, modules, given, loss, self.flip, self.sample_posterior)
        with token:
            losses = self.fit(recipe, folder)
        words = {self.word: tuple(rows.detach().cpu() for rows in token.embeddings)}
        return Customization(words, about={"losses": losses.get("loss", [])})
