"""A picture for every class, kept for ever: which it is at first, and how it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Choice = Literal["confident", "unsure", "mean", "noise", "none"]


def chosen_prototypes(
    choice: Choice,
    x: Float[Tensor, "n *picture"],
    labels: Int[Tensor, "n"],
    logits: Float[Tensor, "n classes"],
    classes: Sequence[int],
    seen: Sequence[int],
    rng: torch.Generator,
) -> Float[Tensor, "class *picture"]:
    """The first prototypes of ``classes``, in their order.

    Args:
        choice: "confident": the picture of the class to which the classifier gives the largest probability of it;
            "unsure": the smallest; "mean": the mean of its pictures; "noise": standard normal; "none": zeros.
        x: pictures, some of each of ``classes``.
        logits: of a classifier for them.
        seen: the classes over which probabilities are taken.
    """
    if choice == "noise":
        return torch.randn(len(classes), *x.shape[1:], generator=rng, dtype=x.dtype)
    if choice == "none":
        return x.new_zeros(len(classes), *x.shape[1:])
    if choice == "mean":
        return torch.stack([x[labels == k].mean(0) for k in classes])
    places = sorted(seen)
    sure = logits[:, places].softmax(1)
    found = []
    for k in classes:
        rows = (labels == k).nonzero()[:, 0]
        p = sure[rows, places.index(k)]
        found.append(x[rows[p.argmax() if choice == "confident" else p.argmin()]])
    return torch.stack(found)


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
