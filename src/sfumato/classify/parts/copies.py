"""Transformed copies of pictures, and losses and logits over (class, transformation) pairs (SLA, arXiv:1910.05872).

The m copies of a picture are neighbours, copy j of picture b at b m + j; of the n m joint labels, class i under
transformation j is i m + j. Transformation 0 is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from sfumato.errors import BadInput, unknown

Transformation = Callable[[Tensor], Tensor]
SIX = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
CYCLIC = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
FAMILIES: dict[str, tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "rotation": ((0, 1, 2, 3), SIX[:1]),
    "rotation2": ((0, 2), SIX[:1]),
    "colour": ((0,), SIX),
    "colour3": ((0,), CYCLIC),
    "rotation2-colour3": ((0, 2), CYCLIC),
    "rotation-colour3": ((0, 1, 2, 3), CYCLIC),
    "rotation-colour": ((0, 1, 2, 3), SIX),
}
"""Quarter turns and orders of channels; of both, all channel orders of a turn come before the next turn."""


def moved(x: Float[Tensor, "*n 3 h w"], turns: int, order: Sequence[int]) -> Float[Tensor, "*n 3 h2 w2"]:
    """``x`` turned to the left by quarter turns, channel ``order[c]`` as channel c."""
    x = torch.rot90(x, turns, (-2, -1)) if turns else x
    return x if list(order) == sorted(order) else x[..., list(order), :, :]


def family(name: str) -> tuple[Transformation, ...]:
    """The transformations of one of `FAMILIES`, the identity first.

    Raises:
        BadInput: there is none of that name.
    """
    if name not in FAMILIES:
        raise unknown("family of transformations", name, FAMILIES)
    turns, orders = FAMILIES[name]
    return tuple(partial(moved, turns=turn, order=order) for turn in turns for order in orders)


def expanded(x: Float[Tensor, "n 3 h w"], transformations: Sequence[Transformation]) -> Float[Tensor, "nm 3 h w"]:
    """All copies of all pictures.

    Raises:
        BadInput: copies are of several shapes, as of pictures that are not square and turned.
    """
    copies = [transformation(x) for transformation in transformations]
    if other := [tuple(y.shape[-2:]) for y in copies if y.shape != x.shape]:
        told = f"{tuple(x.shape[-2:])} become {other[0]}"
        raise BadInput(f"pictures of {told} pixels when transformed: give square ones, or a family without turns")
    return torch.stack(copies, dim=1).flatten(0, 1)


def joint_labels(y: Int[Tensor, "n"], m: int) -> Int[Tensor, "nm"]:
    """The joint label of every copy."""
    return (y[:, None] * m + torch.arange(m, device=y.device)).flatten()


def joint_loss(
    z: Float[Tensor, "nm classes_m"], y: Int[Tensor, "n"], m: int, total: bool = False, smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """L_SLA: the cross-entropy of the joint labels, a mean over copies, or with ``total`` their sum."""
    loss = cross_entropy(z, joint_labels(y, m), label_smoothing=smoothing)
    return loss * m if total else loss


def augmentation_loss(
    z: Float[Tensor, "nm classes"], y: Int[Tensor, "n"], m: int, smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """L_DA: the label is every copy's."""
    return cross_entropy(z, y.repeat_interleave(m), label_smoothing=smoothing)


def multitask_loss(
    z: Float[Tensor, "nm classes"], v: Float[Tensor, "nm m"], y: Int[Tensor, "n"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """L_MT: besides, which transformation it is, from logits ``v`` of their own."""
    m = v.shape[1]
    which = cross_entropy(v, joint_labels(torch.zeros_like(y), m), label_smoothing=smoothing)
    return augmentation_loss(z, y, m, smoothing) + which


def single(z: Float[Tensor, "n classes_m"], m: int) -> Float[Tensor, "n classes"]:
    """SI: the logits of pictures as they are, P(class | picture, identity)."""
    return z[:, ::m]


def aggregated(z: Float[Tensor, "nm classes_m"], m: int) -> Float[Tensor, "n classes"]:
    """AG: the mean over copies of the logits of each copy's own slice; logits, not probabilities."""
    return z.unflatten(0, (-1, m)).unflatten(2, (-1, m)).diagonal(dim1=1, dim2=3).mean(-1)


def distillation_loss(
    student: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    y: Int[Tensor, "n"],
    temperature: float = 1.0,
    weight: float = 1.0,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(s / T) || softmax(student / T)) + beta CE(student, y); the teacher s gets no gradient."""
    aim = softmax(teacher.detach() / temperature, 1)
    apart = kl_div(log_softmax(student / temperature, 1), aim, reduction="batchmean")
    return temperature**2 * apart + weight * cross_entropy(student, y, label_smoothing=smoothing)


def prototype_logits(
    support: Float[Tensor, "sm d"], y: Int[Tensor, "s"], query: Float[Tensor, "qm d"], classes: int, m: int
) -> Float[Tensor, "qm classes_m"]:
    """Joint logits from few examples: minus the squared distance to the mean of each (class, transformation).

    Args:
        support: features of all copies of the examples.
        y: the examples' classes, each at least once.
        query: features of all copies of what is to be told.
    """
    chosen = torch.nn.functional.one_hot(joint_labels(y, m), classes * m).to(support)
    prototypes = (chosen.mT @ support) / chosen.sum(0)[:, None]
    return -torch.cdist(query, prototypes).square()
