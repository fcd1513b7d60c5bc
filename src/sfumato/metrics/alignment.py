"""How well a picture matches its prompt, one number per picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .vision import ClipModel, module_sha256


def named(text: str, words: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Attribute -> the first word of it that ``text`` names, whole words only; attributes not named are left
    out."""
    spoken = re.findall(r"[\w-]+", text.lower())
    found = {a: next((w for w in spoken if w in known), None) for a, known in words.items()}
    return {a: w for a, w in found.items() if w is not None}


def oracle_alignment(
    logits: Mapping[str, Float[Tensor, "n words"]],
    words: Mapping[str, Sequence[str]],
    prompts: Sequence[str],
) -> Float[Tensor, "n"]:
    """The share of the attributes named in each prompt that the oracle reads off its picture, in [0, 1].

    Args:
        logits: attribute -> the oracle's logits of the pictures.
        words: attribute -> its words, in the order of the logits.
        prompts: one per picture. One that names nothing gives NaN.
    """
    read = {a: [words[a][i] for i in x.argmax(dim=1).tolist()] for a, x in logits.items()}
    shares = []
    for i, prompt in enumerate(prompts):
        asked = named(prompt, words)
        right = sum(read[a][i] == w for a, w in asked.items())
        shares.append(right / len(asked) if asked else float("nan"))
    return torch.tensor(shares, dtype=torch.float64)


class ClipScore:
    """100 times the cosine of picture and prompt embedding, one number per pair; the mean is the CLIP score.

    The convention of torchmetrics without its clamp at 0 (Hessel et al., arXiv:2104.08718, multiply by 250
    and clamp each pair). Scores of different CLIP models differ by several points: ``name`` and ``hash`` say
    which.
    """

    def __init__(self, model: str):
        """``model``: any `transformers` CLIP, a folder or hub id."""
        self.clip = ClipModel.load(model)
        self.name = f"CLIP score ({model})"
        self.hash = module_sha256(self.clip.vision.network)
        self.resize = self.clip.vision.prepare.rule

    def __call__(self, images: Float[Tensor, "n 3 height width"], prompts: Sequence[str]) -> Float[Tensor, "n"]:
        return 100 * (self.clip.images(images) * self.clip.texts(prompts)).sum(-1)
