"""Pictures of classifiers: which are trained on and which measured, and what chance does to them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from sfumato.data.base import Pictures, Rows, to_tensor
from sfumato.errors import BadInput
from sfumato.metrics.bootstrap import Estimate, mean_interval, rate_interval
from sfumato.train import draw


class Labelled(Rows):
    """Some rows of other pictures, with their classes."""

    def __init__(self, pictures: Pictures, rows: Sequence[int]):
        super().__init__(pictures, rows)
        self.label_names = pictures.label_names

    def label(self, index: int) -> int:
        return self.pictures.label(self.rows[index])


def split(
    pictures: Pictures, share: float, seed: int, source: str, used: Collection[str] | None = None
) -> tuple[Pictures, Pictures, str]:
    """Pictures to train on, pictures to measure on, and which these are; ``share`` of each class, at least one.

    Args:
        used: the classes that are looked at afterwards, by default all: of others there may be any number of pictures.

    Raises:
        BadInput: fewer than two classes; a class with one picture (with a share) or none.
    """
    names = pictures.label_names
    if len(names) < 2:
        known = f"one class ({names[0]})" if names else "no classes"
        raise BadInput(f"{source} has {known}: give pictures of at least two, such as a folder of two folders")
    labels = [pictures.label(row) for row in range(len(pictures))]
    counts = Counter(labels)
    least = 2 if share else 1
    if short := [name for i, name in enumerate(names) if counts[i] < least and (used is None or name in used)]:
        told = "one picture at most" if share else "no picture"
        raise BadInput(f"the class {short[0]!r} of {source} has {told}: add pictures of it, or leave it out")
    if not share:
        return Labelled(pictures, range(len(labels))), pictures, "the training pictures themselves"
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    left = {i: min(counts[i] - 1, max(1, round(share * counts[i]))) for i in range(len(names))}
    rows: tuple[list[int], list[int]] = ([], [])
    for row in order:
        out = left[labels[row]] > 0
        left[labels[row]] -= out
        rows[out].append(row)
    seen, unseen = (Labelled(pictures, sorted(part)) for part in rows)
    return seen, unseen, f"{share:.0%} of each class, held out"


def flipped(x: Float[Tensor, "n 3 h w"], rng: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """Half of the pictures mirrored."""
    return torch.where((draw.uniform(len(x), rng) < 0.5)[:, None, None, None], x.flip(-1), x)


def shifted(x: Float[Tensor, "n 3 h w"], most: int, rng: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """Each picture moved by up to ``most`` pixels each way, its border repeated."""
    height, width = x.shape[-2:]
    tops, lefts = (draw.integers(2 * most + 1, len(x), rng).tolist() for _ in range(2))
    wide = pad(x, (most,) * 4, mode="replicate")
    return torch.stack(
        [row[:, t : t + height, s : s + width] for row, t, s in zip(wide, tops, lefts, strict=True)]
    )  # fmt: skip


@torch.no_grad()
def measured(net: nn.Module, pictures: Pictures, batch: int, seed: int) -> dict[str, Any]:
    """Top-1 and, of more than five classes, top-5 accuracy, and the cross-entropy in nats, with intervals of 95 %."""
    device, logits, labels = next(net.parameters()).device, [], []
    for first in range(0, len(pictures), batch):
        rows = range(first, min(first + batch, len(pictures)))
        logits.append(net(to_tensor([pictures.picture(row) for row in rows]).to(device)).float().cpu())
        labels += [pictures.label(row) for row in rows]
    z, y = torch.cat(logits), torch.tensor(labels)
    rng = torch.Generator().manual_seed(seed)
    found = {"top1": rate_interval(z.argmax(1) == y, rng)}
    if z.shape[1] > 5:
        found["top5"] = rate_interval((z.topk(5, dim=1).indices == y[:, None]).any(1), rng)
    found["cross_entropy"] = mean_interval(cross_entropy(z, y, reduction="none").double(), rng)
    return {name: _plain(x) for name, x in found.items()}


def _plain(x: Estimate) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(x).items()}
