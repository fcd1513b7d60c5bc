"""Detectors: is the concept in the picture? One seam for the oracle, any image classifier, and CLIP-style
models."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.data import oracle as oracles
from sfumato.errors import BadInput, unknown

from .alignment import named
from .vision import ClipModel, load_vision, module_sha256, reads_text

_FILLERS = {"a", "an", "the", "in", "on", "of", "style", "background", "picture", "shape"}


@dataclass(frozen=True)
class Detection:
    """Per picture: whether the concept was seen, and a score in [0, 1] (higher = surer)."""

    present: Bool[Tensor, "n"]
    score: Float[Tensor, "n"]


class Detector(ABC):
    """Decides whether a concept is in a picture. ``threshold`` is the score from on which it counts as seen."""

    name: str
    hash: str
    threshold: float | str
    resize: str

    @abstractmethod
    def check(self, concept: str) -> None:
        """Raise `BadInput`, saying what it knows, if the detector cannot look for ``concept``."""

    @abstractmethod
    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        """Look for ``concept`` in pictures with values in [0, 1]."""

    def describe(self) -> dict[str, Any]:
        """What a report's protocol says about the detector."""
        return {"name": self.name, "hash": self.hash, "threshold": self.threshold}


class OracleDetector(Detector):
    """The sketch world's oracle. A concept of several words ("red star") is seen when each of them is."""

    name = "sketch oracle"

    def __init__(self, oracle: oracles.Oracle | None = None, threshold: float = 0.5):
        self.oracle = oracle or oracles.load()
        self.hash = module_sha256(self.oracle)
        self.threshold = threshold
        self.resize = f"bilinear, antialiased, to {oracles.SIDE}x{oracles.SIDE}"

    def attributes(self, concept: str) -> dict[str, str]:
        """Attribute -> word, e.g. "red star" -> {"colour": "red", "object": "star"}.

        Raises:
            BadInput: a word that the sketch world does not have.
        """
        words = {a: tuple(w for w in known if w != oracles.NOTHING) for a, known in oracles.WORDS.items()}
        found = named(concept, words)
        for word in re.findall(r"[\w-]+", concept.lower()):
            if word not in found.values() and word not in _FILLERS:
                raise unknown("concept of the sketch world", word, [w for known in words.values() for w in known])
        if not found:
            raise BadInput(f"{concept!r} names nothing of the sketch world: name an object, colour, ground or style")
        return found

    def check(self, concept: str) -> None:
        self.attributes(concept)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        logits = self.oracle(images)
        share = [
            logits[a].softmax(dim=1)[:, self.oracle.words(a).index(w)] for a, w in self.attributes(concept).items()
        ]
        score = torch.stack(share).amin(dim=0).cpu()
        return Detection(score >= self.threshold, score)


class ClassifierDetector(Detector):
    """Any `transformers` image classifier: the concept is seen when its label is among the ``top`` most
    likely.

    A concept matches a label by name, whatever the case; labels with synonyms ("tench, Tinca tinca") by any
    of them.
    """

    def __init__(self, model: str | os.PathLike, top: int = 1, batch_size: int = 64):
        """``model``: a folder written by ``save_pretrained``, or a hub id."""
        from transformers import AutoModelForImageClassification

        self.model = load_vision(model, AutoModelForImageClassification)
        self.name = f"classifier {self.model.name}"
        self.hash = module_sha256(self.model.network)
        self.threshold = f"top-{top}"
        self.top, self.batch_size = top, batch_size
        self.resize = self.model.prepare.rule
        self.labels = [self.model.network.config.id2label[i] for i in range(self.model.network.config.num_labels)]

    def index(self, concept: str) -> int:
        """The number of the concept's label; raises `BadInput` listing the labels where there is none."""
        wanted = _plain(concept)
        for i, label in enumerate(self.labels):
            if wanted in (_plain(label), *map(_plain, label.split(","))):
                return i
        raise unknown(f"label of {self.model.name}", concept, self.labels)

    def check(self, concept: str) -> None:
        self.index(concept)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        index, parts = self.index(concept), []
        for x in images.split(self.batch_size):
            pixels = self.model.prepare(x.to(self.model.device, torch.float32))
            parts.append(self.model.network(pixel_values=pixels).logits.float().cpu())
        logits = torch.cat(parts) if parts else torch.empty(0, len(self.labels))
        top = logits.topk(min(self.top, len(self.labels)), dim=1).indices
        return Detection((top == index).any(dim=1), logits.softmax(dim=1)[:, index])


class ZeroShotDetector(Detector):
    """A CLIP-style model: the concept is seen when its text is nearer to the picture than every other one's.

    The score is the softmax over texts of the model's scaled cosines.
    """

    threshold = "top-1"

    def __init__(
        self,
        model: str | os.PathLike,
        concepts: Sequence[str],
        template: str = "a photo of {}",
        neutral: str = "a photo",
    ):
        """``concepts``: what pictures may show besides the one looked for; ``neutral``: none of them."""
        self.clip = ClipModel.load(model)
        self.name = f"zero-shot {self.clip.vision.name}, {template!r} among {len(set(concepts))} and {neutral!r}"
        self.hash = module_sha256(self.clip.vision.network)
        self.resize = self.clip.vision.prepare.rule
        self.concepts, self.template, self.neutral = tuple(dict.fromkeys(concepts)), template, neutral
        scale = getattr(self.clip.vision.network, "logit_scale", None)
        self.scale = 100.0 if scale is None else float(scale.detach().exp())

    def check(self, concept: str) -> None:
        if not [c for c in self.concepts if c != concept]:
            raise BadInput("zero-shot detection needs other concepts to tell this one from: name some to retain")

    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        others = [c for c in self.concepts if c != concept]
        texts = [self.template.replace("{}", c) for c in (concept, *others)] + [self.neutral]
        embedded = self.clip.texts(texts)
        parts = [self.scale * self.clip.images(x) @ embedded.T for x in images.split(64)]
        logits = torch.cat(parts).float().cpu() if parts else torch.empty(0, len(texts))
        return Detection(logits.argmax(dim=1) == 0, logits.softmax(dim=1)[:, 0])


def make_detector(spec: str | os.PathLike | Detector, concepts: Sequence[str]) -> Detector:
    """A detector from "oracle", or from the folder or hub id of a `transformers` model.

    A CLIP-style model becomes a `ZeroShotDetector` over ``concepts``, every other one a `ClassifierDetector`.
    """
    if isinstance(spec, Detector):
        return spec
    if str(spec) == "oracle":
        return OracleDetector()
    return ZeroShotDetector(spec, concepts) if reads_text(spec) else ClassifierDetector(spec)


def _plain(label: str) -> str:
    return label.strip().lower().replace("_", " ")
