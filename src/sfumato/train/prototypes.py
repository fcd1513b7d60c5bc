"""A picture for every class, kept for ever: which it is at first, and how it is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.data.base import Pictures, to_tensor

Choice = Literal["confident", "unsure", "mean", "noise", "none"]


def surest(
    logits: Float[Tensor, "n classes"],
    labels: Int[Tensor, "n"],
    classes: Sequence[int],
    seen: Sequence[int],
    least: bool = False,
) -> Int[Tensor, "class"]:
    """For each of ``classes`` the row of its own to which a classifier gives the largest probability of the class.

    Args:
        seen: the classes over which probabilities are taken.
        least: the row with the smallest instead.
    """
    places = sorted(seen)
    sure = logits[:, places].softmax(1)
    found = []
    for k in classes:
        rows = (labels == k).nonzero()[:, 0]
        p = sure[rows, places.index(k)]
        found.append(rows[p.argmin() if least else p.argmax()])
    return torch.stack(found)


def class_mean(pictures: Pictures, k: int, batch: int = 256) -> Float[Tensor, "3 height width"]:
    """The mean in [-1, 1] of all pictures of class ``k``."""
    rows = [i for i in range(len(pictures)) if pictures.label(i) == k]
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return sum(to_tensor([pictures.picture(i) for i in part]).sum(0) for part in parts) / len(rows)


def first_prototypes(
    choice: Choice,
    pictures: Pictures,
    classes: Sequence[int],
    sure: Callable[[bool], Int[Tensor, "class"]],
    rng: torch.Generator,
) -> Float[Tensor, "class 3 height width"]:
    """What the prototypes of ``classes`` are before they are learned, in their order, in [-1, 1].

    Args:
        choice: "confident" and "unsure": the pictures that `surest` names; "mean": `class_mean`; "noise": standard
            normal; "none": zeros.
        sure: `surest` of the pictures, told ``least``.
    """
    if choice in ("confident", "unsure"):
        return to_tensor([pictures.picture(i) for i in sure(choice == "unsure").tolist()])
    if choice == "mean":
        return torch.stack([class_mean(pictures, k) for k in classes])
    shape = to_tensor([pictures.picture(0)]).shape[1:]
    noise = choice == "noise"
    return torch.randn(len(classes), *shape, generator=rng) if noise else torch.zeros(len(classes), *shape)


def updated_prototypes(
    prototypes: Float[Tensor, "class *picture"],
    slope: Float[Tensor, "class *picture"],
    counts: Int[Tensor, "class"],
    lr: float,
    decay: float,
    towards: Float[Tensor, "class *picture"] | None = None,
) -> Float[Tensor, "class *picture"]:
    """p_y <- (1 - decay) p_y + decay p0_y - lr dL/dp_y / n_y; classes of which the batch had none stay as they are.

    Args:
        slope: dL/dp, L the mean over the batch.
        counts: n_y, how many pictures of each class the batch had.
        towards: p0; None: zeros, with which it is the published rule.
    """
    shape = (-1,) + (1,) * (prototypes.ndim - 1)
    n = counts.reshape(shape).to(prototypes)
    moved = prototypes * (1 - decay) - slope * lr / n.clamp(min=1)
    moved = moved if towards is None else moved + decay * towards
    return torch.where(n > 0, moved, prototypes)


def nearest_old(
    words: Float[Tensor, "classes *dims"], new: Sequence[int], old: Sequence[int],
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> Int[Tensor, "new"]:  # fmt: skip
    """For each new class the old one whose text is nearest: largest cosine, or smallest distance."""
    flat = words.flatten(1).double()
    a, b = flat[list(new)], flat[list(old)]
    if metric == "cosine":
        # As torch's cosine has it, a vector of length zero is at right angles to all.
        unit_a, unit_b = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-8) for x in (a, b))
        far = -unit_a @ unit_b.mT
    else:
        far = torch.cdist(a, b)
    return torch.tensor(list(old), device=words.device)[far.argmin(1)]


def neighbour_error(
    pred: Float[Tensor, "n *picture"], neighbour: Float[Tensor, "n *picture"], steps: Int[Tensor, "n"]
) -> Float[Tensor, "n"]:
    """t_i ||pred_i - sg(neighbour_i)||^2 / (3HW), t_i the timestep from 0; no gradient reaches ``neighbour``."""
    return (pred - neighbour.detach()).square().flatten(1).mean(1) * steps.to(pred.dtype)
