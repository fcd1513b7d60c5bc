"""One task after the other: which classes come when, the loss over the classes seen so far, what has been forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy

from sfumato.data.base import Pictures, Rows
from sfumato.errors import BadInput, unknown

Tasks = tuple[tuple[str, ...], ...]
"""The names of the classes of each task, in order."""


def named_tasks(labels: Sequence[str], tasks: Sequence[Sequence[str]]) -> Tasks:
    """``tasks`` as they are, if they can be: at least two, of known classes, none of which is in two of them.

    Raises:
        BadInput: says which class or task is wrong.
    """
    seen: dict[str, int] = {}
    for i, task in enumerate(tasks, 1):
        if not task:
            raise BadInput(f"task {i} has no classes: name at least one, or leave the task out")
        for name in task:
            if name not in labels:
                raise unknown("class", name, tuple(labels))
            if name in seen:
                again = f"is named twice in task {i}" if seen[name] == i else f"is in task {seen[name]} and in task {i}"
                raise BadInput(f"the class {name!r} {again}: tasks share no classes, so leave it in one of them")
            seen[name] = i
    if len(tasks) < 2:
        raise BadInput(f"{len(tasks)} task is no sequence: name two at least")
    return tuple(map(tuple, tasks))


def split_tasks(labels: Sequence[str], first: float, after: int, seed: int | None = None) -> Tasks:
    """The first task has the share ``first`` of all classes; ``after`` tasks of one size follow.

    Args:
        seed: of the order of the classes; None keeps that of ``labels``.

    Raises:
        BadInput: the classes cannot be cut so.
    """
    n = len(labels)
    order = range(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    names = [labels[i] for i in order]
    start = round(first * n)
    each, left = divmod(n - start, after)
    if left or not each:
        raise BadInput(
            f"{n - start} of {n} classes after the first task cannot be cut into {after} tasks of one size: give "
            "another --after or --first, or name the classes of each with --tasks"
        )
    parts = [names[i : i + each] for i in range(start, n, each)]
    return named_tasks(labels, [names[:start], *parts] if start else parts)


def seen_cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], seen: Sequence[int]
) -> Float[Tensor, "batch"]:
    """Cross-entropy over the logits of the classes in ``seen`` alone, in nats; the head has all that will ever come."""
    seen = sorted(seen)
    place = torch.full((logits.shape[1],), -100, device=labels.device)
    place[torch.tensor(seen, device=labels.device)] = torch.arange(len(seen), device=labels.device)
    return cross_entropy(logits[:, seen], place[labels], reduction="none")


def average_accuracy(matrix: Float[Tensor, "task task"]) -> Float[Tensor, "task"]:
    """A_t = 1/t sum_{j <= t} a_{t,j}, where a_{t,j} is the accuracy on task j after task t; tasks count alike."""
    tasks = torch.arange(1, len(matrix) + 1, dtype=matrix.dtype, device=matrix.device)
    return matrix.tril().sum(1) / tasks


def weighted_accuracy(matrix: Float[Tensor, "task task"], sizes: Sequence[int]) -> Float[Tensor, "task"]:
    """As `average_accuracy`, but classes count alike: ``sizes`` are the tasks' numbers of classes."""
    weights = torch.tensor(sizes, dtype=matrix.dtype, device=matrix.device)
    return (matrix.tril() * weights).sum(1) / weights.cumsum(0)


def forgetting(matrix: Float[Tensor, "task task"]) -> Float[Tensor, "task"]:
    """F_t = 1/t sum_{j <= t} (a_{j,j} - a_{t,j}): what has been lost since each task was learned.

    The last task, which cannot have been forgotten, counts in t; others divide by t - 1.
    """
    return average_accuracy(matrix.diagonal()[None] - matrix)


def held_back(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places in ``labels`` to train on and to choose by: ``share`` of each class, at least one where it has two."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    counts = {label: labels.count(label) for label in set(labels)}
    left = {k: min(n - 1, max(1, round(share * n))) if share else 0 for k, n in counts.items()}
    parts: tuple[list[int], list[int]] = ([], [])
    for place in order:
        out = left[labels[place]] > 0
        left[labels[place]] -= out
        parts[out].append(place)
    return sorted(parts[0]), sorted(parts[1])


class Chosen(Rows):
    """Some rows of other pictures, with the class numbers that they have here."""

    def __init__(self, pictures: Pictures, rows: Sequence[int], labels: Sequence[int]):
        super().__init__(pictures, rows)
        self.labels = list(labels)

    def label(self, index: int) -> int:
        return self.labels[index]

    def part(self, places: Sequence[int]) -> Chosen:
        """These of its rows."""
        return Chosen(self, places, [self.labels[place] for place in places])


class Drawn(Pictures):
    """Pictures that a model drew, with the classes that they were drawn as."""

    def __init__(self, pixels: UInt8[np.ndarray, "n height width 3"], labels: Sequence[int]):
        self.pixels, self.labels = pixels, list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return self.labels[index]

    def picture(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def part(self, places: Sequence[int]) -> Drawn:
        """These of its pictures."""
        return Drawn(self.pixels[list(places)], [self.labels[place] for place in places])


class Joined(Pictures):
    """The pictures of several sources, one after the other."""

    def __init__(self, *parts: Chosen | Drawn):
        self.labels = [label for part in parts for label in part.labels]
        self.places = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self.places)

    def label(self, index: int) -> int:
        return self.labels[index]

    def picture(self, index: int) -> np.ndarray:
        part, place = self.places[index]
        return part.picture(place)


def replay_parts(drawn: Drawn, share: float = 0.8) -> tuple[Drawn, Drawn]:
    """The first ``share`` of each class to train on, the rest to choose by."""
    counts = {label: drawn.labels.count(label) for label in set(drawn.labels)}
    place, parts = dict.fromkeys(counts, 0), ([], [])  # type: ignore[var-annotated]
    for i, label in enumerate(drawn.labels):
        parts[place[label] >= round(share * counts[label])].append(i)
        place[label] += 1
    return drawn.part(parts[0]), drawn.part(parts[1])
