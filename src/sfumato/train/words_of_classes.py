"""Text vectors of class names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import load_text2image
from sfumato.pipeline.conditioning import Role

from .draw import step_seed

RANDOM = "random"


def class_words(text: str, labels: Sequence[str], tokens: int, width: int) -> Float[Tensor, "class token width"]:
    """``tokens`` vectors for each name.

    Args:
        text: "random": standard normal ones of length ``width``, the same for a name whatever the others are; or a
            text-to-image model: of its text encoder's rows the one where the text ends, or with more ``tokens`` than
            one the first ones.

    Raises:
        BadInput: no such model, or fewer rows than ``tokens``.
    """
    if text == RANDOM:
        seeds = [step_seed(*name.encode()) for name in labels]
        return torch.stack([torch.randn(tokens, width, generator=torch.Generator().manual_seed(s)) for s in seeds])
    cond = load_text2image(text, "cpu").encode(list(labels))
    if tokens > cond.tokens.shape[1]:
        raise BadInput(f"the text encoder of {text} gives {cond.tokens.shape[1]} vectors: give at most as many tokens")
    if tokens > 1 or cond.roles is None:
        return cond.tokens[:, :tokens].detach().float()
    ends = (cond.roles == Role.END).int().argmax(1)
    return cond.tokens[torch.arange(len(labels)), ends][:, None].detach().float()
