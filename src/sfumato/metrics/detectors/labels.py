"""What detectors share that choose one of many labels: whose label a concept is, and whether it is among the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import unknown

from .base import Detection, Detector


class LabelDetector(Detector):
    """The concept is seen when its label is among the ``top`` most likely.

    A concept matches a label by name, whatever the case; labels with synonyms ("tench, Tinca tinca") by any of them.
    Where several labels have one name (ImageNet's two cranes), any of them is the concept's.
    """

    labels: Sequence[str]
    top: int = 1

    def indices(self, concept: str) -> list[int]:
        """The numbers of the concept's labels; raises `BadInput` listing all labels where there is none."""
        wanted = plain(concept)
        found = [i for i, x in enumerate(self.labels) if wanted in (plain(x), *map(plain, x.split(",")))]
        if not found:
            raise unknown(f"label of {self.name}", concept, self.labels)
        return found

    def check(self, concept: str) -> None:
        self.indices(concept)

    def judged(self, shares: Float[Tensor, "n label"], concept: str) -> Detection:
        """The verdict on probabilities of all labels."""
        own = torch.tensor(self.indices(concept))
        first = shares.topk(min(self.top, len(self.labels)), dim=1).indices
        return Detection(torch.isin(first, own).any(dim=1), shares[:, own].sum(dim=1))


def joined(parts: Sequence[Float[Tensor, "n label"]], labels: Sequence[str]) -> Float[Tensor, "n label"]:
    """Rows of several batches as one tensor, also where there are none."""
    return torch.cat(list(parts)) if parts else torch.empty(0, len(labels))


def plain(label: str) -> str:
    """A label as it is compared."""
    return label.strip().lower().replace("_", " ")


def beside(model: str, name: str) -> Path:
    """A file of that name in the folder of a model's file, or in the folder that it is."""
    path = Path(model).expanduser()
    return (path if path.is_dir() else path.parent) / name
