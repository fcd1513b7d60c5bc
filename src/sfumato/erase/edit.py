"""What closed-form erasers have in common: they solve for new weights, then write them into a copy."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import Conditioning, Text2Image, wrap

from .base import Eraser


@dataclass(frozen=True)
class Edit:
    """New values for some of a network's parameters, and how they were found.

    Attributes:
        weights: by parameter name in the network, e.g. ``mid_block. ... .attn2.to_k.weight``.
        log: numbers for a report (JSON types): condition numbers, residuals, what was kept.
        embeddings: token embeddings found on the way, to be rendered or studied; None where a method finds none.
    """

    weights: dict[str, Float[Tensor, "out dim"]]
    log: dict[str, Any] = field(default_factory=dict)
    embeddings: Float[Tensor, "round concept length dim"] | None = None

    def write(self, pipe: Text2Image) -> Text2Image:
        """A copy of ``pipe`` that owns these weights, frozen like any pipeline, and shares all others."""
        edited = pipe.copy(own=self.weights)
        parameters = dict(edited.network.named_parameters())
        with torch.no_grad():
            for name, value in self.weights.items():
                parameters[name].copy_(value)
                parameters[name].requires_grad_(False)
        return edited


@dataclass(frozen=True, kw_only=True)
class ClosedForm(Eraser):
    """An eraser that solves for the edited weights: no images, no gradients, no randomness (``seed`` is not used)."""

    # Only these: the others weigh each preserved prompt against the concept, which so many would outweigh.
    keeps_world: ClassVar[bool] = True

    @abstractmethod
    def solve(self, pipe: Text2Image) -> Edit:
        """The edit and its log; ``pipe`` is only read."""

    def apply(self, pipe: Text2Image) -> Text2Image:
        return self.run(pipe)[0]

    def run(self, pipe: Text2Image) -> tuple[Text2Image, dict[str, Any]]:
        pipe = wrap(pipe)
        edit = self.solve(pipe)
        return edit.write(pipe), {**edit.log, "preserve": list(self.kept(pipe))}


def encode_words(pipe: Text2Image, prompts: list[str]) -> Conditioning:
    """Encode prompts, each of which must hold something the tokenizer knows.

    Raises:
        BadInput: a prompt has no content tokens, or one that the tokenizer only knows as "unknown".
    """
    cond = pipe.encode(prompts)
    last = pipe.last_word_token(cond)
    for i, prompt in enumerate(prompts):
        content = cond.ids[i, 1 : int(last[i]) + 1]
        if not len(content):
            raise BadInput(f"the tokenizer reads no word in {prompt!r}: name the concept in words")
        # CLIP's tokenizers read what they cannot spell as the end token.
        if (content == cond.ids[i, last[i] + 1]).any():
            raise BadInput(f"the tokenizer cannot read all of {prompt!r}: use the letters it was trained on")
    return cond
