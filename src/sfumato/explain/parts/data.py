"""Pictures with classes that explanations are judged on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.finite import require_finite_pictures


@dataclass(frozen=True)
class Labelled:
    """Pictures and their classes."""

    pictures: Float[Tensor, "n channel height width"]
    labels: Int[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.labels)


def check(data: Labelled) -> None:
    """Raise `BadInput` for pictures or labels that cannot be."""
    x, y = data.pictures, data.labels
    if x.ndim != 4 or not x.is_floating_point():
        raise BadInput(f"judge pictures shaped (n, channels, height, width) in [-1, 1], not {x.dtype} {tuple(x.shape)}")
    if y.ndim != 1 or len(y) != len(x) or y.is_floating_point():
        raise BadInput(f"give one label, a whole number, for each picture: got {len(y)} for {len(x)}")
    require_finite_pictures(x)
    if y.dtype == torch.bool:
        raise BadInput("labels are numbers of classes, not true or false: give whole numbers")
    if len(y.unique()) < 2:
        raise BadInput("all pictures have one label: judge explanations on pictures of at least two classes")


def as_the_network(network: nn.Module, data: Labelled) -> Labelled:
    """The same with pictures in the precision of the network's weights, and labels as losses take them."""
    weight = next((p for p in network.parameters() if p.is_floating_point()), data.pictures)
    return Labelled(data.pictures.to(weight.dtype), data.labels.long())


@torch.no_grad()
def check_fits(network: nn.Module, *data: Labelled) -> None:
    """Raise `BadInput` where the network does not give logits for these pictures and labels."""
    for part in data:
        logits = network(part.pictures[:2])
        if logits.ndim != 2 or len(logits) != len(part.pictures[:2]):
            raise BadInput(f"the network must give logits shaped (n, classes), and gives {tuple(logits.shape)}")
        if int(part.labels.max()) >= logits.shape[1] or int(part.labels.min()) < 0:
            raise BadInput(f"the network knows {logits.shape[1]} classes: give labels from 0 to {logits.shape[1] - 1}")


def split(data: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """Pictures to train on and ``share`` of each class, at least one picture, to measure on.

    Raises:
        BadInput: a class with one picture.
    """
    rng, out = torch.Generator().manual_seed(seed), torch.zeros(len(data), dtype=torch.bool)
    for label in data.labels.unique().tolist():
        rows = (data.labels.cpu() == label).nonzero()[:, 0]
        if len(rows) < 2:
            raise BadInput(f"class {label} has one picture: add pictures of it, or give others to measure on")
        most = min(len(rows) - 1, max(1, round(share * len(rows))))
        out[rows[torch.randperm(len(rows), generator=rng)[:most]]] = True
    out = out.to(data.labels.device)
    return tuple(Labelled(data.pictures[rows], data.labels[rows]) for rows in (~out, out))  # type: ignore[return-value]
