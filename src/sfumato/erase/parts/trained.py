"""What an eraser that fine-tunes may train: a set of the network's own weights, or a low-rank adapter beside them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from sfumato.pipeline import Text2Image
from sfumato.train.recipe import Loose

Trained = Literal["xattn", "xattn-strict", "selfattn", "noxattn", "full", "lora"]


def student_of(pipe: Text2Image, trained: Trained, name: str, rank: int, seed: int) -> tuple[Text2Image, nn.Module]:
    """A copy of ``pipe`` that predicts the same so far, and the module whose parameters are to be trained.

    Args:
        trained: a subset as in `Text2Image.parameters`; or "lora": an adapter with alpha = rank on all layers inside
            the transformer blocks.
        name: of the adapter, ``rank`` its rank, ``seed`` of its factors.
    """
    if trained != "lora":
        student = pipe.copy(own=trained)
        return student, student.network
    student = pipe.copy()
    generator = torch.Generator().manual_seed(seed)
    adapter = student.add_adapter(name, rank=rank, alpha=rank, generator=generator)
    factors = {f"{layer}.{w}": getattr(adapter, w)[layer] for w in ("down", "up") for layer in adapter.layers}
    return student, Loose(factors)


def size_of(pipe: Text2Image, trained: Trained, rank: int) -> int:
    """How many numbers that is."""
    if trained != "lora":
        return sum(p.numel() for p in pipe.parameters(trained).values())
    return sum(p.numel() for p in pipe.copy().add_adapter("scratch", rank=rank).parameters())
