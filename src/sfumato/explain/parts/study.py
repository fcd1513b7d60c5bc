"""The points of a study: classifiers trained on damaged pictures, and what they get wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.train.draw import step_seed

from .data import Labelled
from .kept import Kept
from .retraining import Retrain, said
from .ways import Ways

Parts = Callable[[], tuple[Tensor, Tensor]]
"""Pictures to train on and pictures to measure on, made when they are needed."""


class Study:
    """One classifier, one way of damage, and the points that are known.

    ``advance`` is called after each training, also one that was done before.
    """

    def __init__(
        self, network: nn.Module, seen: Labelled, unseen: Labelled, ways: Ways, retrain: Retrain, kept: Kept, seed: int,
        batch: int, shown: int,
    ):  # fmt: skip
        self.network, self.seen, self.unseen, self.ways, self.retrain = network, seen, unseen, ways, retrain
        self.kept, self.seed, self.batch, self.shown = kept, seed, batch, min(shown, len(unseen))
        self.pictures = torch.cat([seen.pictures, unseen.pictures])
        self.labels = torch.cat([seen.labels, unseen.labels])
        self.classes = said(network, self.pictures, batch)
        self.advance: Callable[[], None] = lambda: None

    def point(self, name: str, run: int, parts: Parts) -> dict[str, Any]:
        """What one classifier, trained on the first of ``parts``, says of the second; known points are not made
        again."""
        key = f"{name}, run {run}"
        if key not in self.kept.points:
            train, test = parts()
            network = self.retrain(train, self.seen.labels, step_seed(self.seed, 1, run))
            self.kept.keep(key, self._told(said(network, test, self.batch)))
        self.advance()
        return self.kept.points[key]

    def strength(
        self, name: str, maps: Float[Tensor, "n channel h w"], strength: float, runs: Sequence[int]
    ) -> dict[str, Any]:
        """What is wrong at one strength: of this classifier, and of one trained again for each of ``runs``."""
        n, rows = len(self.seen), range(len(self.pictures) if runs else len(self.unseen))
        rows = range(len(self.pictures) - len(rows), len(self.pictures))

        @cache
        def parts() -> tuple[Tensor, Tensor]:
            first = rows.start
            made = self.ways.damaged(self.pictures[first:], maps[first:], strength, rows)
            return made[: max(0, n - first)], made[max(0, n - first) :]

        key = f"{name}, {strength!r}, as it is"
        if key not in self.kept.points:
            self.kept.keep(key, self._told(said(self.network, parts()[1], self.batch)))
        found = [self.point(f"{name}, {strength!r}", run, parts) for run in runs]
        return {"strength": strength, "original": self.kept.points[key], "runs": found}

    def probe(self, name: str, maps: Float[Tensor, "n channel h w"]) -> float:
        """How often a classifier is right that sees directions, or masks, and no pictures."""
        bare, n = self.ways.bare(maps), len(self.seen)
        return 1 - self.point(f"{name}, alone", 0, lambda: (bare[:n], bare[n:]))["wrong"] / len(self.unseen)

    def strip(
        self, maps: Float[Tensor, "n channel h w"], classes: Int[Tensor, "n"], points: Sequence[dict[str, Any]]
    ) -> list[tuple[str, Tensor]]:
        """For each shown test picture itself, its map, and how it is at every strength, with what was said of it."""
        n = len(self.seen)
        x, a = (tensor[n : n + self.shown] for tensor in (self.pictures, maps))
        rows = range(n, n + self.shown)
        damaged = [self.ways.damaged(x, a, point["strength"], rows) for point in points] if self.shown else []
        strip = []
        for i in range(self.shown):
            largest = a[i].abs().max().clamp_min(1e-30)
            label = f"class {int(self.unseen.labels[i])}, taken for {int(self.classes[n + i])}"
            strip += [(label, x[i].cpu()), (f"map for class {int(classes[n + i])}", (a[i] / largest).cpu())]
            for point, made in zip(points, damaged, strict=True):
                answers = [run["said"][i] for run in point["runs"]] or [point["original"]["said"][i]]
                strip.append((f"{point['strength']:g}: taken for {', '.join(map(str, answers))}", made[i].cpu()))
        return strip

    def _told(self, answers: Int[Tensor, "n"]) -> dict[str, Any]:
        return {"wrong": int((answers != self.unseen.labels).sum()), "said": answers[: self.shown].tolist()}
