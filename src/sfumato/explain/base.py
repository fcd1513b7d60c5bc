"""What a judge of explanations is: a dataclass of settings whose verb is `run`, a classifier in and figures out."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.fields import Count, Seed, Share
from sfumato.settings import Tuned

from .parts.attributions import Attribution
from .parts.data import Labelled, as_the_network, check, check_fits, split
from .parts.retraining import Retrain

Maps = Mapping[str, Attribution]


@dataclass(frozen=True)
class Judgement:
    """What a judge found.

    Attributes:
        figures: by name, in JSON's types.
        strips: for each attribution the pictures of a page: (label, picture in [-1, 1]).
    """

    figures: dict[str, Any]
    strips: Mapping[str, list[tuple[str, Tensor]]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Judge(Tuned, ABC):
    """Fields that every judge of explanations has.

    A new one is one file: a subclass that says in `judged` what it finds. What is the same for all is here: what may be
    judged, the pictures it is measured on, a network left as it was.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    """Settings with which it takes about a second on a tiny network, for the tests that all judges share."""

    held_out: Share = 0.2
    """Share of each class to measure on, at least one picture, where no other pictures are given for that."""
    batch: Count = 64
    """Pictures computed together."""
    seed: Seed = 0
    """Seed of all that is drawn."""

    def run(
        self, network: nn.Module, pictures: Float[Tensor, "n channel height width"], labels: Int[Tensor, "n"],
        **more: Any,
    ) -> dict[str, Any]:
        """`judge`'s figures: by name, in JSON's types."""
        return self.judge(network, pictures, labels, **more).figures

    def judge(
        self,
        network: nn.Module,
        pictures: Float[Tensor, "n channel height width"],
        labels: Int[Tensor, "n"],
        *,
        test: tuple[Tensor, Tensor] | None = None,
        retrain: Retrain | None = None,
        projector: Any = None,
        others: Maps | None = None,
        folder: Path | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> Judgement:
        """What the explanations of ``network`` are worth on these pictures. ``network`` is left as it was.

        Args:
            network: pictures to logits.
            pictures: in [-1, 1], for instance the ones that it was trained on.
            labels: their classes, counted from 0.
            test: pictures and classes to measure on; by default ``held_out`` of the pictures, by class.
            retrain: ``retrain(pictures, labels, seed)`` trains a classifier from scratch by the recipe of ``network``;
                by default a copy of it with fresh weights is trained by a recipe of the settings.
            projector: a model of such pictures, or a function ``(x, t0, rows) -> x``.
            others: more attributions by name, as functions ``(network, x, classes, generator)``.
            folder: where what is measured is kept; killed, the same call goes on.
            advance: called after each training.

        Raises:
            BadInput: pictures without labels, of one class, or not finite; a network that does not fit them; an
                attribution of the wrong shape; a folder of something else.
        """
        seen = Labelled(pictures, labels)
        check(seen)
        if test is None:
            seen, unseen = split(seen, self.held_out, self.seed)
        else:
            check(unseen := Labelled(*test))
            if unseen.pictures.shape[1:] != seen.pictures.shape[1:]:
                shapes = (tuple(part.pictures.shape[1:]) for part in (unseen, seen))
                raise BadInput("pictures to measure on are shaped {}, the others {}: give one shape".format(*shapes))
        own = copy.deepcopy(network).eval().requires_grad_(False)
        seen, unseen = (as_the_network(own, part) for part in (seen, unseen))
        check_fits(own, seen, unseen)
        cards = [pictures.device] if pictures.is_cuda else []
        with torch.random.fork_rng(cards):
            asked = {"retrain": retrain, "projector": projector, "others": others or {}}
            return self.judged(own, seen, unseen, asked, folder, advance)

    @abstractmethod
    def judged(
        self, network: nn.Module, seen: Labelled, unseen: Labelled, asked: Mapping[str, Any], folder: Path | None,
        advance: Callable[[], None],
    ) -> Judgement:
        """`judge`, of what has been checked; ``asked`` holds ``retrain``, ``projector`` and ``others``."""
