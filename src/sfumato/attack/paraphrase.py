"""Paraphrase: the concept by other names, in other languages, and in other forms of its own name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from sfumato.data.cases import AttackCases, say
from sfumato.errors import BadInput
from sfumato.fields import Count
from sfumato.metrics.detectors import Detector
from sfumato.pipeline import Text2Image
from sfumato.progress import bar

from .base import Box, Found, Means
from .parts.names import LANGUAGES, NAMES, SYNONYMS
from .parts.prompts import Candidates, TextAttack, Texts
from .parts.words import Words, generator, random_words

Language = Literal["es", "fr", "de", "it", "pt"]
Kind = Literal["synonyms", "languages", "forms"]


@dataclass(frozen=True, kw_only=True)
class Paraphrase(TextAttack):
    """What anybody tries first: ask for the concept in other words (after the multilingual and attack axes of the
    Holistic Unlearning Benchmark, arXiv:2410.05664).

    In each prompt the concept's name gives way to one of its paraphrases, in random order, until the judge sees the
    concept in the picture: names that are given, near synonyms and names in five other languages where a small table
    has some, and forms of the name itself (plural, phrases around it, slips of spelling). Nothing of the model is seen
    but its pictures.

    Cost: at most ``most`` pictures for each case.

    Differs from the paper: it draws whole prompts that a language model translated, ten thousand of them without
    looking at success; here the name alone is replaced, and the judge ends the search. The table and its languages are
    ours. A case that its plain prompt breaks is not attacked.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"most": 2}
    box: ClassVar[Box] = "black"
    needs_judge: ClassVar[bool] = True

    names: tuple[str, ...] = ()
    """What else the concept is called, in whatever language; these are tried besides the table's."""
    kinds: tuple[Kind, ...] = ("synonyms", "languages", "forms")
    """Which paraphrases are tried: synonyms, languages, forms."""
    languages: tuple[Language, ...] = LANGUAGES  # type: ignore[assignment]
    """Which languages of the table: es, fr, de, it, pt."""
    most: Count = 16
    """Paraphrases that are tried for a case at most."""

    @property
    def tries(self) -> int:
        return self.most

    def rows(self, cases: int, sampling_steps: int) -> float:
        return 2.0 * cases * self.most * sampling_steps

    def check(self, pipe: Text2Image, cases: AttackCases) -> None:
        """See `Attack.check`: is there any paraphrase?"""
        if not self.paraphrases(cases.concept):
            raise BadInput(
                f"no other name of {cases.concept!r} is known: give some, as in --names, or let forms of it be tried"
            )

    def paraphrases(self, concept: str) -> list[str]:
        """All that may stand in the place of the concept's name, each once, in the order of the fields."""
        found = [*self.names]
        if "synonyms" in self.kinds:
            found += combined(concept, SYNONYMS)
        if "languages" in self.kinds:
            for language in self.languages:
                found += combined(concept, {w: (names[LANGUAGES.index(language)],) for w, names in NAMES.items()})
        if "forms" in self.kinds:
            found += forms(concept)
        return [text for text in dict.fromkeys(found) if text != concept]

    def blind(self, pipe: Text2Image, prompt: str, concept: str, rng: torch.Generator) -> str:
        words = Words(pipe)
        return say(prompt, concept, words.text(random_words(words, 1, rng)))

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
        """A random token in the place of the concept's name, as often as there are paraphrases of it."""
        there = replace(self, most=min(self.most, len(self.paraphrases(cases.concept))))
        return TextAttack.control(there, pipe, cases, other, judge=judge, original=original, progress=progress)

    def search(self, pipe: Text2Image, cases: AttackCases, means: Means) -> Texts:
        """Try the paraphrases of each open case in an order of its own; see `Attack.search`."""
        known = self.paraphrases(cases.concept)
        candidates, rounds = Candidates(pipe, cases, means), min(self.most, len(known))
        orders = [torch.randperm(len(known), generator=generator(self.seed, i)) for i in range(len(cases.cases))]
        with means.spending.allowed(), bar("asking in other words", rounds, means.progress) as advance:
            for k in range(rounds):
                said = {i: say(cases.prompts[i], cases.concept, known[orders[i][k]]) for i in candidates.open}
                candidates.ask(said)
                advance()
        return Texts(cases.concept, self.budget(), candidates.said)


def combined(concept: str, table: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The concept with each of its words, alone or all together, replaced by the table's k-th name for it.

    "red star" becomes "scarlet asterisk", "scarlet star", "red asterisk", ...; nothing where no word is in the table.
    """
    words = [w for w in table if say(concept, w, "") != concept]
    made = []
    for k in range(max((len(table[w]) for w in words), default=0)):
        whole = concept
        for word in words:
            name = table[word][min(k, len(table[word]) - 1)]
            whole = say(whole, word, name)
            made.append(say(concept, word, name))
        made.append(whole)
    return list(dict.fromkeys(made))


def forms(concept: str) -> list[str]:
    """The name itself in other forms: plural, phrases around it, and slips of spelling in its last word."""
    *rest, last = concept.split(" ")
    many = last + ("es" if last.endswith(("s", "sh", "ch", "x")) else "s")
    middle = len(last) // 2
    swapped = last[: middle - 1] + last[middle] + last[middle - 1] + last[middle + 1 :] if len(last) > 2 else last
    spelled = [many, last + last[-1], swapped, f"{last[:middle]}-{last[middle:]}", " ".join(last)]
    made = [" ".join([*rest, word]) for word in spelled]
    phrases = [f"two {made[0]}", f"{concept} shape", f"shape of a {concept}", f"drawing of a {concept}"]
    return [*made, *phrases]
