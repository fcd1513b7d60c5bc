"""How well a picture matches its prompt, one number per picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import unknown

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


CONVENTIONS = {
    "torchmetrics": "100 cos, the mean clamped at 0",
    "hessel": "2.5 max(cos, 0), prompts preceded by 'A photo depicts'",
}
HESSEL_PREFIX = "A photo depicts "


class ClipScore:
    """Cosine c of picture and prompt embedding, one number per pair; the mean is the CLIP score.

    Two conventions are in use (arXiv:2104.08718, eq. 1, is Hessel's):

    - "torchmetrics": 100 c per pair, and the mean clamped at 0 (`least` is for whoever takes the mean);
    - "hessel": 2.5 max(c, 0) per pair, prompts preceded by "A photo depicts".

    Scores of different CLIP models differ by several points: ``name`` and ``hash`` say which.
    """

    def __init__(self, model: str, convention: Literal["torchmetrics", "hessel"] = "torchmetrics"):
        """``model``: any `transformers` CLIP, a folder or hub id."""
        if convention not in CONVENTIONS:
            raise unknown("convention of the CLIP score", convention, CONVENTIONS)
        self.clip = ClipModel.load(model)
        self.convention = convention
        self.definition, self.least = CONVENTIONS[convention], 0.0
        self.name = f"CLIP score ({model})"
        self.hash = module_sha256(self.clip.vision.network)
        self.resize = self.clip.vision.prepare.rule

    def __call__(self, images: Float[Tensor, "n 3 height width"], prompts: Sequence[str]) -> Float[Tensor, "n"]:
        hessel = self.convention == "hessel"
        texts = [f"{HESSEL_PREFIX}{p}" for p in prompts] if hessel else prompts
        cosines = (self.clip.images(images) * self.clip.texts(texts)).sum(-1)
        return 2.5 * cosines.clamp(min=0) if hessel else 100 * cosines


def clip_direction(
    clip: ClipModel,
    before: Float[Tensor, "n 3 height width"],
    after: Float[Tensor, "n 3 height width"],
    source: Sequence[str],
    target: Sequence[str],
) -> Float[Tensor, "n"]:
    """Whether an edit went where its words point: cos(E(after) - E(before), E(target) - E(source)), in [-1, 1].

    E are unit-length embeddings (Gal et al. 2022, arXiv:2108.00946, eq. 3). Pictures in [0, 1]; an edit that changed
    nothing gives NaN.
    """
    moved = clip.images(after) - clip.images(before)
    meant = clip.texts(target) - clip.texts(source)
    return (moved * meant).sum(-1) / (moved.norm(dim=-1) * meant.norm(dim=-1))
