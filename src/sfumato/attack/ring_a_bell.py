"""Ring-A-Bell: words whose encoding is the prompt's with more of the concept in it, bred by a genetic algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.data.cases import TEMPLATES, AttackCases, say
from sfumato.errors import BadInput
from sfumato.fields import Count, Share, at_least
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.progress import bar

from .base import Box, Means
from .parts.prompts import Candidates, TextAttack, Texts
from .parts.words import Words, generator, random_words, shared_words, wide

NEUTRAL_WORDS = ("thing", "person", "place", "animal", "building", "plant", "landscape", "vehicle")


@dataclass(frozen=True, kw_only=True)
class RingABell(TextAttack):
    """Ring-A-Bell (arXiv:2310.10012, section 3): the concept's direction is added, and words are found that say it.

    With E the text encoder (all rows of its output that the network looks at: PixArt's does not at those of padding),
    the concept's direction is the mean over pairs of prompts that differ in the concept alone,

        c = mean_i [E(prompt_i with the concept) - E(prompt_i without)],

    and for each prompt p the attack finds the K tokens that minimise || E(p) + eta c - E(tokens) ||^2, summed over all
    rows, by a genetic algorithm: of a population the better half is kept; each parent pairs with a random mate with
    probability ``crossover``, at a random cut, into two more children; each individual is mutated with probability
    ``mutation`` at one place. The tokens take the whole prompt's place. The denoiser is never asked (the paper calls
    this a black box): the encoder is the original model's where there is one, as an attacker would take the public one.

    Cost: generations x population rows through the text encoder for each prompt.

    Differs from the paper: the pairs are made of plain templates (and the prompts attacked) with other words in the
    concept's place, not of collected prompts; a case that its plain prompt breaks is not attacked.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"tokens": 4, "population": 6, "generations": 3}
    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {"eta": (1.0, 2.0, 3.0), "tokens": (6, 10), "population": (60, 120)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "long": {"tokens": 38, "eta": 5.5},
        "sketch": {"population": 60, "generations": 150, "tokens": 10, "eta": 2.0, "elitism": True},
    }
    """Settings by name: the paper's (which are the defaults), those for diffuse concepts, and some for models as small
    as the embedded one."""
    box: ClassVar[Box] = "grey"

    tokens: Count = 16
    """Tokens that are searched, K: 16, 38 or 77 (less what the model needs for start and end) in the paper."""
    eta: float = 3.0
    """How much of the concept's direction is added; 5 to 5.5 for diffuse concepts."""
    population: Annotated[int, at_least(2)] = 200
    """Individuals at first; of each generation the better half of so many is kept."""
    generations: Count = 3000
    """Generations; the last one only ranks."""
    crossover: Share = 0.5
    """Probability that a parent pairs."""
    mutation: Share = 0.25
    """Probability that an individual is mutated, at one place."""
    elitism: bool = False
    """Leave the best of each generation as it is; the published code mutates it like any other."""
    contexts: tuple[str, ...] = ()
    """Prompts with {} where the concept stands, of which the pairs are made; empty: plain ones, and those attacked."""
    instead: tuple[str, ...] = ()
    """What stands there in the prompt without the concept; empty: in the sketch world the other words of its kind, else
    a few neutral ones. With the contexts these should make 30 pairs or more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any("{}" not in context for context in self.contexts):
            raise BadInput('every context needs {} where the concept stands, for example "a photo of {}"')

    @property
    def tries(self) -> int:
        return 1

    def check(self, pipe: Text2Image, cases: AttackCases) -> None:
        """See `Attack.check`: do the text encoders share a vocabulary, and do the tokens fit?"""
        if self.tokens > (room := shared_words(pipe).room):
            raise BadInput(f"{self.tokens} tokens do not fit: this model reads {room} besides start and end")

    def blind(self, pipe: Text2Image, prompt: str, concept: str, rng: torch.Generator) -> str:
        words = Words(pipe)
        return words.text(random_words(words, self.tokens, rng))

    def search(self, pipe: Text2Image, cases: AttackCases, means: Means) -> Texts:
        """Breed tokens for each prompt with open cases; see `Attack.search`."""
        candidates, words = Candidates(pipe, cases, means), Words(means.original or pipe)
        ids = words.usable[words.usable > 0]  # as published: all but start, end and the token 0
        with torch.no_grad(), means.spending.allowed():
            direction = self.direction(words.pipe, cases)
            prompts = candidates.by_prompt()
            with bar("breeding words", len(prompts) * self.generations, means.progress) as advance:
                for prompt, numbers in prompts.items():
                    target = encoding(words.pipe, words.pipe.encode(prompt)) + self.eta * direction
                    read = lambda rows: encoding(words.pipe, words.encode_many(rows.tolist()))
                    loss = lambda rows, target=target, read=read: distance(target, read(rows))
                    best: list[Tensor] = []
                    try:
                        self._breed(ids, loss, generator(self.seed, numbers[0]), best, means, advance)
                    finally:
                        for i in numbers if best else ():
                            candidates.keep(i, words.text(best[-1].tolist()))
        return Texts(cases.concept, self.budget(), candidates.said)

    def direction(self, pipe: Text2Image, cases: AttackCases) -> Float[Tensor, "length width"]:
        """The concept's direction in a pipeline's encodings, of those pairs that it reads whole."""
        read = lambda text: len(pipe.tokenizers[0](text).input_ids) <= pipe.context_length
        pairs = self.pairs(pipe, cases)
        told, without = zip(*([p for p in pairs if all(map(read, p))] or pairs), strict=True)
        return concept_vector(*(encoding(pipe, pipe.encode(list(texts))) for texts in (told, without)))

    def pairs(self, pipe: Text2Image, cases: AttackCases) -> list[tuple[str, str]]:
        """Prompts with the concept, and the same without."""
        concept, attribute = cases.concept, [w for w in pipe.vocabulary.values() if cases.concept in w]
        others = [w for w in attribute[0] if w != concept] if attribute else NEUTRAL_WORDS
        plain = [t.replace("{concept}", "{}") for t in TEMPLATES] + [say(p, concept, "{}") for p in cases.prompts]
        contexts = self.contexts or tuple(dict.fromkeys(c for c in plain if "{}" in c))
        put = lambda context, word: context.replace("{}", word)
        return [(put(c, concept), put(c, word)) for c in contexts for word in self.instead or others]

    def _breed(
        self,
        ids: Int[Tensor, "words"],
        loss: Callable[[Tensor], Tensor],
        rng: torch.Generator,
        best: list[Tensor],
        means: Means,
        advance: Callable[[], None],
    ) -> None:
        """Put the best tokens of each generation into ``best``."""
        individuals = ids[torch.randint(len(ids), (self.population, self.tokens), generator=rng)]
        for generation in range(self.generations):
            means.spending.check()
            kept = fittest(individuals, loss(individuals), self.population // 2)
            best[:] = [kept[0]]
            advance()
            if generation < self.generations - 1:
                bred = mutated(crossed(kept, self.crossover, rng), self.mutation, ids, rng)
                individuals = torch.cat([kept[:1], bred]) if self.elitism else bred


def encoding(pipe: Text2Image, cond: Conditioning) -> Float[Tensor, "batch length width"]:
    """E: all rows that the network looks at, and zeros."""
    return wide(pipe.as_seen(cond).tokens)


def concept_vector(
    told: Float[Tensor, "pairs length width"], without: Float[Tensor, "pairs length width"]
) -> Float[Tensor, "length width"]:
    """The mean difference of encodings with and without the concept (eq. 1)."""
    return (wide(told) - wide(without)).mean(dim=0)


def distance(
    target: Float[Tensor, "one length width"], encoded: Float[Tensor, "n length width"]
) -> Float[Tensor, "n"]:
    """Squared distance to the target, summed over all rows and channels: what the algorithm minimises."""
    return (wide(target) - wide(encoded)).square().sum(dim=(1, 2))


def fittest(individuals: Int[Tensor, "n k"], losses: Float[Tensor, "n"], kept: int) -> Int[Tensor, "kept k"]:
    """The ``kept`` (at least one) of least loss, in order."""
    return individuals[losses.cpu().argsort(stable=True)[: max(kept, 1)]]


def crossed(parents: Int[Tensor, "n k"], rate: float, rng: torch.Generator) -> Int[Tensor, "m k"]:
    """The parents, and two children of each that pairs: with a random mate, cut in the same place.

    The cut leaves 0 to k - 1 tokens of one in front of the other's, as the published code counts (1 to k, with the
    start token).
    """
    n, k = parents.shape
    pairs = torch.rand(n, generator=rng) < rate
    mates = parents[torch.randint(n, (n,), generator=rng)]
    front = torch.arange(k) < torch.randint(k, (n, 1), generator=rng)
    one, two = torch.where(front, parents, mates), torch.where(front, mates, parents)
    return torch.cat([parents, one[pairs], two[pairs]])


def mutated(
    individuals: Int[Tensor, "n k"], rate: float, ids: Int[Tensor, "words"], rng: torch.Generator
) -> Int[Tensor, "n k"]:
    """Each individual with probability ``rate`` with another token, of ``ids``, at one random place."""
    n, k = individuals.shape
    hit = torch.rand(n, 1, generator=rng) < rate
    there = torch.arange(k) == torch.randint(k, (n, 1), generator=rng)
    return torch.where(hit & there, ids[torch.randint(len(ids), (n, 1), generator=rng)], individuals)
