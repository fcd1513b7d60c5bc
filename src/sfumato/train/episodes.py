"""Episodes, groups of pictures that belong together, and pairs from them that are alike, but not too much."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from sfumato.data.base import Pictures
from sfumato.errors import BadInput

from . import draw

CLASSES, FOLDERS = "classes", "folders"
Episodes = Sequence[Int[Tensor, "picture"]]
"""The rows of the pictures of each episode."""


def episodes_of(pictures: Pictures, by: str) -> Episodes:
    """The pictures grouped by their class, by the folder that they lie in, or by their text.

    Args:
        by: "classes", "folders", or else a caption template with which ``pictures`` were opened ("{album}").

    Warns:
        UserWarning: episodes of one picture, which are left out.

    Raises:
        BadInput: pictures without classes or names, or none of which another one belongs to.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    if by == CLASSES and not pictures.label_names:
        raise BadInput('these pictures have no classes to group them by: give episodes "folders" or "{column}"')
    for i in range(len(pictures)):
        if by == CLASSES:
            key = str(pictures.label(i))
        elif by == FOLDERS:
            if not (name := pictures.name(i)):
                raise BadInput('these pictures lie in no folders: give episodes "classes" or "{column}"')
            key = str(PurePosixPath(name).parent)
        else:
            key = pictures.caption(i)
        if key:
            groups[key].append(i)
    found = [torch.tensor(rows) for rows in groups.values() if len(rows) > 1]
    if not found:
        raise BadInput(f"no episode has two pictures, by {by}: group them so that some belong together")
    if alone := len(groups) - len(found):
        warnings.warn(f"{alone} episodes of one picture are left out: nothing belongs with it", stacklevel=2)
    return found


def within(similarity: Float[Tensor, "..."], low: float, high: float) -> Bool[Tensor, "..."]:
    """Which pairs are neither unrelated nor near duplicates: low <= cos <= high."""
    return (similarity >= low) & (similarity <= high)


class Pairs:
    """Ordered pairs of two pictures of an episode, uniform over episodes, and in an episode over the pairs allowed.

    Args:
        features: what the frozen encoder sees in each picture, by which their likeness is judged (cosine).
        episodes: rows of ``features``.
        similar: (low, high), the cosines between which a pair is kept.
        quantiles: ``similar`` are shares instead: of the cosines of pairs of one episode (a sample of 20,000).
        most: pictures of an episode, drawn with ``seed`` where it has more.

    Attributes:
        bounds: the cosines between which pairs are kept.
        episodes: those in which some pair is.

    Raises:
        BadInput: no pair is left.

    Memory: the features. Time: of each episode the square of its pictures once, then its pictures for each pair.
    """

    def __init__(
        self,
        features: Float[Tensor, "n dim"],
        episodes: Episodes,
        similar: tuple[float, float],
        quantiles: bool = False,
        most: int = 1000,
        seed: int = 0,
    ):
        rng = torch.Generator().manual_seed(seed)
        self.unit = normalize(features.float(), dim=-1)
        capped = [rows[torch.randperm(len(rows), generator=rng)[:most]] for rows in episodes]
        self.bounds = self._quantiles(capped, similar, rng) if quantiles else similar
        counts = [torch.stack([self._allowed(rows, i).sum() for i in range(len(rows))]) for rows in capped]
        kept = [k for k, count in enumerate(counts) if count.sum()]
        if not kept:
            low, high = self.bounds
            raise BadInput(
                f"no pair of an episode has a similarity between {low:.3g} and {high:.3g}: widen --similar, or give "
                "its bounds as shares with --quantiles"
            )
        self.episodes = [capped[k] for k in kept]
        self.ends = [counts[k].cumsum(0) for k in kept]
        self.kept = sum(int(count.sum()) for count in counts) / sum(len(r) * (len(r) - 1) for r in capped)
        """The share of the pairs that the filter keeps."""

    def draw(self, n: int, rng: torch.Generator) -> Int[Tensor, "n two"]:
        """Rows of what is shown and of what is to be drawn."""
        chosen, place = draw.uniform(n, rng), draw.uniform(n, rng)
        return torch.tensor([self._pair(*at) for at in zip(chosen.tolist(), place.tolist(), strict=True)])

    def _pair(self, chosen: float, place: float) -> tuple[int, int]:
        e = min(int(chosen * len(self.episodes)), len(self.episodes) - 1)
        rows, ends = self.episodes[e], self.ends[e]
        k = min(int(place * int(ends[-1])), int(ends[-1]) - 1)
        i = int(torch.searchsorted(ends, k, right=True))
        partners = self._allowed(rows, i).nonzero()[:, 0]
        return int(rows[i]), int(rows[partners[k - int(ends[i - 1] if i else 0)]])

    def _allowed(self, rows: Int[Tensor, "picture"], i: int) -> Bool[Tensor, "picture"]:
        """Which pictures of an episode go with its ``i``-th; the same product each time, so to the same bit."""
        cosines = (self.unit[rows] @ self.unit[rows[i]]).clamp(-1, 1)  # of the same picture more than 1, by rounding
        allowed = within(cosines, *self.bounds)
        allowed[i] = False
        return allowed

    def _quantiles(
        self, episodes: Episodes, shares: tuple[float, float], rng: torch.Generator, n: int = 20_000
    ) -> tuple[float, float]:
        first, second = [], []
        for rows in episodes:
            m = max(1, n // len(episodes))
            i = torch.randint(len(rows), (m,), generator=rng)
            j = (i + 1 + torch.randint(len(rows) - 1, (m,), generator=rng)) % len(rows)
            first.append(rows[i])
            second.append(rows[j])
        cosines = (self.unit[torch.cat(first)] * self.unit[torch.cat(second)]).sum(1)
        low, high = torch.quantile(cosines.double(), torch.tensor(shares, dtype=torch.float64)).tolist()
        return low, high
