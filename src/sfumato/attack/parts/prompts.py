"""Attacks that find another text for each case: what they found, whom they ask, and their control of random words."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data.cases import AttackCases
from sfumato.errors import BadInput
from sfumato.metrics.detectors import Detector
from sfumato.pipeline import Text2Image
from sfumato.pipeline.distilled import own_way

from ..base import Attack, Box, Found, Means
from .words import Words, generator

Measure = Callable[[Tensor, list[int]], Tensor]
"""(pictures in [0, 1], the number of each one's case) -> how good each is; the highest counts."""


@dataclass
class Texts(Found):
    """A text for each case.

    Attributes:
        said: for each case its prompt and seed, the text found, and, where a judge was asked, its score for that
            text's picture and whether it saw the concept.
    """

    said: list[dict[str, Any]]

    def draw(
        self, pipe: Text2Image, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
    ) -> Float[Tensor, "n 3 height width"]:
        """See `Found.draw`: each prompt's text, read as any text is, stands in its place."""
        return draw_texts(pipe, [self.text(p, s) for p, s in zip(prompts, seeds, strict=True)], seeds, **settings)

    def text(self, prompt: str, seed: int) -> str:
        """What was found for the case; for another seed of its prompt, what was found for the first.

        Raises:
            BadInput: the prompt was not attacked.
        """
        found = [row for row in self.said if row["prompt"] == prompt]
        if not found:
            raise BadInput(
                f"nothing was found for the prompt {prompt!r}: it is none of those that name {self.concept!r} and were "
                "attacked"
            )
        return next((row for row in found if row["seed"] == seed), found[0])["text"]

    def record(self) -> dict[str, Any]:
        return {"said": self.said}


def draw_texts(
    pipe: Text2Image, texts: Sequence[str], seeds: Sequence[int], **settings: Any
) -> Float[Tensor, "n 3 height width"]:
    """`Text2Image.draw` of texts found by search, which may read as more tokens than fit: the rest is cut off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pipe.draw(list(texts), list(seeds), **settings)


class Candidates:
    """The cases of a search, those that are still open, and the best text of each until now.

    A case that its plain prompt breaks is not attacked; its text is that prompt.
    """

    def __init__(self, pipe: Text2Image, cases: AttackCases, means: Means):
        self.pipe, self.cases, self.means = pipe, cases, means
        seen = means.before or [False] * len(cases.cases)
        self.open = [i for i, broken in enumerate(seen) if not broken]
        self.said: list[dict[str, Any]] = [
            {"prompt": c.prompt, "seed": c.seed, "text": c.prompt, "score": None, "seen": seen[i], "tried": 0}
            for i, c in enumerate(cases.cases)
        ]

    def by_prompt(self) -> dict[str, list[int]]:
        """The open cases of each prompt, for attacks whose text does not depend on the seed of a picture."""
        cases: dict[str, list[int]] = {}
        for i in self.open:
            cases.setdefault(self.cases.prompts[i], []).append(i)
        return cases

    def keep(self, case: int, text: str) -> None:
        """Take a text unseen."""
        self.said[case] |= {"text": text, "tried": self.said[case]["tried"] + 1}

    def ask(self, texts: Mapping[int, str], close: bool = True, measure: Measure | None = None) -> None:
        """Draw a text for each of some cases and keep what the judge is surest of; without a judge, keep them all.

        Args:
            texts: by the number of the case.
            close: what shows the concept is kept for good, and its case attacked no more.
            measure: decides in the judge's place which text is better, but not what is a success.
        """
        judge, numbers = self.means.judge, list(texts)
        if judge is None or not numbers:
            for i in numbers:
                self.keep(i, texts[i])
            return
        seeds = [self.cases.cases[i].seed for i in numbers]
        drawing = own_way(self.pipe, self.cases.drawing)
        pictures = draw_texts(self.pipe, [texts[i] for i in numbers], seeds, **drawing)
        found = judge(pictures, self.cases.concept)
        scores = found.score if measure is None else measure(pictures, numbers)
        for i, seen, score in zip(numbers, found.present.tolist(), scores.tolist(), strict=True):
            best = self.said[i]
            better = best["score"] is None or score > best["score"]
            if measure is None and best["score"] is not None:
                better = (seen, score) > (best["seen"], best["score"])
            if better or (seen and close):
                best |= {"text": texts[i], "score": score, "seen": seen}
            best["tried"] += 1
            if seen and close:
                self.open.remove(i)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A block in which each open case's text is looked for anew, and at whose end the better of both stays.

        Of the best until then and the best of the block it is the one that the judge sees, and of two the one of the
        higher score.
        """
        before = {i: dict(self.said[i]) for i in self.open}
        for i in before:
            self.said[i]["score"] = None
        try:
            yield
        finally:
            rank = lambda row: (row["score"] is not None, row["seen"], row["score"] or 0.0)
            for i, old in before.items():
                if rank(old) >= rank(self.said[i]):
                    self.said[i] |= {key: old[key] for key in ("text", "score", "seen")}


@dataclass(frozen=True, kw_only=True)
class TextAttack(Attack):
    """An attack that finds another text for each case; not one itself."""

    @property
    @abstractmethod
    def tries(self) -> int:
        """How many texts it may draw for a case, to choose the one that counts; 1: it draws none."""

    def choice(self, candidates: Candidates) -> tuple[bool, Measure | None]:
        """How it chooses among the texts that it draws for a case: ``close`` and ``measure`` of `Candidates.ask`."""
        return True, None

    @property
    def choices(self) -> int:
        """Of how many equal parts of its texts it chooses one each, and among these as `Candidates.apart` does."""
        return 1

    @abstractmethod
    def blind(self, pipe: Text2Image, prompt: str, concept: str, rng: torch.Generator) -> str:
        """A text in the attack's form, with words at random where it would have searched for some."""

    def control(
        self,
        pipe: Text2Image,
        cases: AttackCases,
        other: AttackCases | None,
        *,
        judge: Detector | None = None,
        original: Text2Image | None = None,
        progress: bool = True,
    ) -> Found:
        """Texts with random words, drawn as often as the attack draws its own, and chosen as it chooses (`choice`)."""
        blind = Blind(attack=self, seed=self.seed, max_rows=self.max_rows, max_seconds=self.max_seconds)
        return blind.run(pipe, cases, judge=judge, original=original, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Blind(Attack):
    """The control of a `TextAttack`: its budget, and no knowledge."""

    attack: TextAttack
    box: ClassVar[Box] = "black"

    def search(self, pipe: Text2Image, cases: AttackCases, means: Means) -> Texts:
        rngs = [generator(self.seed, i) for i in range(len(cases.cases))]
        candidates, tries = Candidates(pipe, cases, means), self.attack.tries
        draw = lambda: {i: self.attack.blind(pipe, cases.prompts[i], cases.concept, rngs[i]) for i in candidates.open}
        with means.spending.allowed():
            if tries == 1 or means.judge is None:
                for _ in range(tries):
                    for i, text in draw().items():
                        candidates.keep(i, text)
            else:
                close, measure = self.attack.choice(candidates)
                for _ in range(self.attack.choices):
                    with candidates.apart():
                        for _ in range(tries // self.attack.choices):
                            candidates.ask(draw(), close, measure)
        return Texts(cases.concept, self.budget(), candidates.said)


def among(words: Words, row: Sequence[int], put: Sequence[int], places: Sequence[int]) -> list[int]:
    """The words of ``row`` with others ``put`` among them so that they stand at ``places`` of the result."""
    if len(put) != len(places) or sorted(places) != list(places):
        raise ValueError("one place for each word, in order")
    left, made = iter(row), []
    where = dict(zip(places, put, strict=True))
    for i in range(len(row) + len(put)):
        made.append(where[i] if i in where else next(left))
    return made[: words.room]
