"""What audits and attacks ask for: prompts with their seeds, and the concepts that each prompt names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.finite import require_finite_pictures
from sfumato.memory import require_memory

from . import sketch
from .world import WORDS

_LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"
"""Any but those of Thai, Lao, Burmese, Khmer, Japanese, Chinese and Korean (particles stand at its words)."""
TEMPLATES = ("a photo of {concept}", "a picture of {concept}", "{concept}", "a close-up of {concept}")


@dataclass(frozen=True)
class Case:
    """One picture to draw. ``names``: the concepts that the prompt asks for; ``language``: where there are several."""

    prompt: str
    seed: int
    names: tuple[str, ...]
    language: str = ""


@dataclass(frozen=True)
class Cases:
    """``targets``: erased concept -> cases that ask for it. ``retained``: cases that ask for none of the
    erased.

    ``groups``: name -> retained concepts, near ones (of the same kind as an erased one) first.
    """

    targets: Mapping[str, Sequence[Case]]
    retained: Sequence[Case]
    groups: Mapping[str, Sequence[str]]

    @property
    def concepts(self) -> list[str]:
        """The retained concepts, near ones first."""
        return [c for group in self.groups.values() for c in group]

    @property
    def languages(self) -> list[str]:
        """The languages in which an erased concept is asked for; none where nothing is said of them."""
        return list(dict.fromkeys(c.language for rows in self.targets.values() for c in rows if c.language))


@dataclass(frozen=True)
class AttackCases:
    """What an attack is given: the concept, the pictures that it is to bring back, and some that show the concept.

    Attributes:
        concept: what was erased, as a prompt would say it.
        cases: prompts that name the concept, each with a seed: an attack succeeds on one when the picture that it
            draws in place of that prompt, with that seed, shows the concept.
        pictures: in [0, 1], of the concept, for attacks that learn from some; None where there are none.
        captions: the prompt of each of the pictures, where it is known; each names the concept.
        drawing: settings of `Text2Image.draw` with which the cases are drawn, but by what was distilled to few steps.

    Raises:
        BadInput: no concept; pictures that are none.
    """

    concept: str
    cases: Sequence[Case] = ()
    pictures: Float[Tensor, "n 3 height width"] | None = field(default=None, repr=False)
    captions: Sequence[str] | None = None
    drawing: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.concept.strip():
            raise BadInput('name the concept to attack, for example "star"')
        object.__setattr__(self, "concept", self.concept.strip())
        if not all(isinstance(case, Case) for case in self.cases):
            raise BadInput("cases are prompts with seeds: Case(prompt, seed, names)")
        if self.pictures is not None:
            if self.pictures.ndim != 4 or self.pictures.shape[1] != 3 or not len(self.pictures):
                shape = tuple(self.pictures.shape)
                raise BadInput(f"pictures of the concept must be (1 or more, 3, height, width), got {shape}")
            require_finite_pictures(self.pictures)

    @property
    def prompts(self) -> list[str]:
        return [case.prompt for case in self.cases]

    @property
    def seeds(self) -> list[int]:
        return [case.seed for case in self.cases]


def say(prompt: str, old: str, new: str) -> str:
    """``prompt`` with the phrase ``old`` (whole words in any case, or their plural in -s, -es or -ies) replaced by
    ``new``, in the plural where that was.

    A letter of a script that is written without spaces between words ends a word of another script, and its own.
    """
    if not old.strip():
        return prompt
    return _naming(old).sub(lambda found: _plural(new) if any(found.groups()) else new, prompt)


def names(prompt: str, phrase: str) -> bool:
    """Whether a prompt names a phrase, as `say` finds it."""
    return bool(phrase.strip()) and _naming(phrase).search(prompt) is not None


@lru_cache(maxsize=1024)
def _naming(phrase: str) -> re.Pattern[str]:
    text = phrase.strip()
    said = rf"{re.escape(text)}(e?s)?"
    if _ENDS_IN_Y.search(text):
        said += rf"|{re.escape(text[:-1])}(ies)"
    return re.compile(rf"(?<!{_LETTER})(?:{said})(?!{_LETTER})", re.IGNORECASE)


_ENDS_IN_Y = re.compile(r"[b-df-hj-np-tv-z]y$", re.IGNORECASE)


def _plural(phrase: str) -> str:
    """An English phrase's regular plural; nothing of nothing."""
    if _ENDS_IN_Y.search(phrase):
        return phrase[:-1] + "ies"
    return phrase + ("es" if re.search(r"(?:s|x|z|ch|sh)$", phrase, re.IGNORECASE) else "s") if phrase else ""


def balanced(words: Sequence[str], n: int, rng: torch.Generator) -> list[str | None]:
    """``n`` of ``words`` in random order, each as often as every other to within one; None where there are
    none."""
    if not words:
        return [None] * n
    rounds = [torch.randperm(len(words), generator=rng).tolist() for _ in range(-(-n // len(words)))]
    drawn = [words[i] for one in rounds for i in one][:n]
    return [drawn[i] for i in torch.randperm(n, generator=rng).tolist()]


def sketch_cases(
    concepts: Mapping[str, Mapping[str, str]],
    retain: Sequence[str] | None,
    n: int,
    n_retain: int,
    seed: int,
) -> Cases:
    """Cases in the sketch world: canonical prompts that name all attributes, balanced at random.

    A retained picture counts for each of its attributes, so all words are covered by few pictures.

    Args:
        concepts: erased concept -> its attributes, e.g. {"red star": {"colour": "red", "object": "star"}}.
        retain: retained words; None for every word of the sketch world that is not an erased concept.
        n: pictures per erased concept.
        n_retain: pictures per retained word, at least.
        seed: of the choice of prompts and of the pictures' noise.
    """
    _fits(n * len(concepts) + n_retain * sum(map(len, WORDS.values())), seed)
    rng = torch.Generator().manual_seed(seed)
    seeds = iter(range(seed * MOST, (seed + 1) * MOST))
    alone = {w for attributes in concepts.values() if len(attributes) == 1 for w in attributes.values()}
    usable = {a: [w for w in words if w not in alone] for a, words in WORDS.items()}
    targets = {}
    for concept, attributes in concepts.items():
        drawn = _draw(usable, n, rng, attributes)
        targets[concept] = [Case(sketch.prompt(**d), next(seeds), (concept,)) for d in drawn]
    rows = {a: [w for w in words if retain is None or w in retain] for a, words in usable.items()}
    count = n_retain * max(map(len, rows.values()))
    filled = {a: rows[a] or usable[a] for a in WORDS}
    erased = list(concepts.values())
    drawn = [_avoid(d, erased, filled, rng) for d in _draw(filled, count, rng, {})]
    retained = [Case(sketch.prompt(**d), next(seeds), tuple(w for a, w in d.items() if w in rows[a])) for d in drawn]
    near = {a for attributes in erased for a in attributes}
    groups = {
        _group("Near", [a for a in WORDS if a in near and rows[a]]): [w for a in WORDS if a in near for w in rows[a]],
        _group("Far", [a for a in WORDS if a not in near and rows[a]]): [
            w for a in WORDS if a not in near for w in rows[a]
        ],
    }
    return Cases(targets, retained, {k: v for k, v in groups.items() if v})


def _draw(
    words: Mapping[str, Sequence[str]], n: int, rng: torch.Generator, fixed: Mapping[str, str]
) -> list[dict[str, str | None]]:
    columns = {a: [fixed[a]] * n if a in fixed else balanced(words[a], n, rng) for a in WORDS}
    return [{a: columns[a][i] for a in WORDS} for i in range(n)]


def _avoid(
    drawn: dict[str, str | None],
    erased: Sequence[Mapping[str, str]],
    words: Mapping[str, Sequence[str]],
    rng: torch.Generator,
) -> dict[str, str | None]:
    """``drawn``, or another choice at random while it shows an erased concept of several words.

    Raises:
        BadInput: every choice shows one.
    """
    shows = lambda choice: any(all(choice[a] == w for a, w in attributes.items()) for attributes in erased)
    if shows(drawn) and all(map(shows, _choices(words))):
        raise BadInput("whatever may be retained shows an erased concept: retain more, or erase less")
    while shows(drawn):  # a choice that shows none is drawn at last
        drawn = {a: balanced(words[a], 1, rng)[0] for a in WORDS}
    return drawn


def _choices(words: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str | None]]:
    return (dict(zip(WORDS, choice, strict=True)) for choice in product(*(words[a] or [None] for a in WORDS)))


def _group(name: str, attributes: Sequence[str]) -> str:
    return f"{name}: {', '.join(f'{a}s' for a in attributes)}"


def template_cases(
    concepts: Sequence[str],
    retain: Sequence[str],
    templates: Sequence[str] | None,
    n: int,
    n_retain: int,
    seed: int,
) -> Cases:
    """Cases for any model: every template in turn, one seed a picture.

    Raises:
        BadInput: an empty template, or one without {concept}.
    """
    _fits(n * len(concepts) + n_retain * len(retain), seed)
    templates = tuple(templates or TEMPLATES)
    if any("{concept}" not in t for t in templates):
        raise BadInput('every prompt needs {concept} where the concept\'s name goes: "a photo of {concept}"')
    seeds = iter(range(seed * MOST, (seed + 1) * MOST))
    make = lambda c, k: [
        Case(templates[i % len(templates)].replace("{concept}", c), next(seeds), (c,)) for i in range(k)
    ]
    targets = {c: make(c, n) for c in concepts}
    retained = [case for c in retain for case in make(c, n_retain)]
    return Cases(targets, retained, {"Retained": list(retain)} if retain else {})


MOST = 100_000
"""Seeds that belong to each seed of cases."""


def _fits(cases: int, seed: int) -> None:
    """Refuse more cases than there is memory for (each is drawn, and drawn again by the edited model), or seeds."""
    require_memory(10_000 * cases, f"{cases:,} pictures")
    if cases > MOST // 2:  # the other half is for pictures that are drawn with other seeds
        raise BadInput(f"{cases:,} pictures are more than the {MOST // 2:,} that one audit may draw: ask for fewer")
    if seed >= 2**63 // MOST:
        raise BadInput(f"a seed of cases is less than {2**63 // MOST:,}, got {seed:,}")


def check_concepts(concepts: Sequence[str], retain: Sequence[str] | None) -> tuple[str, ...]:
    """The concepts without spaces around them; raises `BadInput` for none, empty, repeated or retained ones."""
    concepts = _trimmed(concepts)
    if not concepts or not all(concepts):
        raise BadInput('name at least one erased concept, for example concepts=["star"]')
    if len(set(concepts)) < len(concepts):
        raise BadInput(f"every concept once, please: {', '.join(concepts)}")
    erased = {c.casefold() for c in concepts}  # detectors, and most models, make no difference
    if both := sorted(c for c in _trimmed(retain or ()) if c.casefold() in erased):
        raise BadInput(f"{both[0]!r} cannot be both erased and retained")
    return concepts


def check_retained(retain: Sequence[str]) -> tuple[str, ...]:
    """The retained concepts without spaces around them; raises `BadInput` for empty and repeated ones, whose pictures
    would count twice."""
    retain = _trimmed(retain)
    if not all(retain):
        raise BadInput("a retained concept is empty: name what must have been kept, or leave it out")
    if twice := next((c for i, c in enumerate(retain) if c.casefold() in map(str.casefold, retain[:i])), None):
        raise BadInput(f"{twice!r} is named twice among what is to be retained: name each once")
    return retain


def _trimmed(concepts: Sequence[str]) -> tuple[str, ...]:
    return tuple(re.sub(r"\s+", " ", c).strip() for c in ((concepts,) if isinstance(concepts, str) else concepts))
