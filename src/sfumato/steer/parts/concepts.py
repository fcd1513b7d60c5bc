"""Concepts in prompts: the phrases of a text, and the rows of its encoding that stand for each."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.conditioning import Role

_BETWEEN = (
    " a an the this that these those his her its their some of on in at to by for from with without and or but as is "
    "are was were be being has have having into onto over under above below near behind beside between inside outside "
    "next left right top front while who which wearing holding sitting standing "
)
"""Words that stand between phrases, and are part of none."""
_FRAMES = " photo photograph picture image painting drawing illustration render style background "
"""What the picture is and not what is in it, at the end of a phrase."""
_WORD = re.compile(r"[^\s.,;:!?()\[\]\"]+|[.,;:!?()\[\]\"]")


def phrases(text: str) -> tuple[str, ...]:
    """The concepts of a prompt, each once: runs of words between articles, prepositions, conjunctions and punctuation.

    "a photo of a red star and a blue circle" has "red star" and "blue circle". There is no grammar in it, only a list
    of English words: where it fails, concepts can be named.
    """
    found: dict[str, None] = {}
    begin = end = None
    last = ""
    for match in [*_WORD.finditer(text), None]:
        word = "" if match is None else match[0].lower()
        if match is not None and f" {word} " not in _BETWEEN and not re.fullmatch(r"[.,;:!?()\[\]\"]", word):
            begin, end, last = match.start() if begin is None else begin, match.end(), word
            continue
        if begin is not None and f" {last} " not in _FRAMES:
            found[text[begin:end]] = None
        begin = None
    return tuple(found)


class Concepts:
    """Which rows of an encoded prompt stand for which concept.

    Args:
        names: words or phrases that every prompt must have; none: those that `phrases` finds in each.
        tokens: numbers of rows instead, each a concept.
    """

    def __init__(self, p: Text2Image, names: Sequence[str] = (), tokens: Sequence[int] = ()):
        self.p, self.names, self.tokens = p, tuple(names), tuple(tokens)
        self.found: dict[str, list[str]] = {}
        """By prompt, the concepts that acted."""
        self._latest: tuple[Conditioning, Tensor] | None = None

    def rows(self, cond: Conditioning) -> Bool[Tensor, "batch concept length"]:
        """For each prompt its concepts, as rows of the tokens; where a prompt has fewer than another, some are empty.

        A row belongs to one concept: where names overlap ("star" and "red star"), to the longer one.

        Raises:
            BadInput: a name that a prompt does not have, or that its context cuts off; a row that is no word; a
                prompt whose text is not known, where it is needed.
        """
        if self._latest is not None and self._latest[0].prompts == cond.prompts:
            before, made = self._latest
            if torch.equal(before.ids, cond.ids):
                return made
        each = [self._by_number(cond, i) if self.tokens else self._by_name(cond, i) for i in range(len(cond))]
        most = max(len(rows) for rows in each)
        made = cond.ids.new_zeros(len(each), most, cond.ids.shape[1], dtype=torch.bool)
        for i, rows in enumerate(each):
            for k, row in enumerate(rows):
                made[i, k] = row
        self._latest = (cond, made)
        return made

    def _by_number(self, cond: Conditioning, i: int) -> list[Tensor]:
        length = cond.ids.shape[1]
        for k in self.tokens:
            if k >= length or (cond.roles is not None and cond.roles[i, k] != Role.WORD):
                raise BadInput(f"token {k} is no word of {_text(cond, i)!r}: count from 0, the start token included")
        return [torch.arange(length, device=cond.ids.device) == k for k in self.tokens]

    def _by_name(self, cond: Conditioning, i: int) -> list[Tensor]:
        text = _text(cond, i)
        if not self.names and cond.roles is not None and not bool((cond.roles[i] == Role.WORD).any()):
            return []
        if not text and (not self.names or bool((cond.ids[i] == -1).all())):
            raise BadInput(
                "the text behind these embeddings is not known: draw from a prompt, or give its concepts as tokens"
            )
        names = self.names or phrases(text)
        taken = torch.zeros_like(cond.mask[i])
        spans: dict[str, Tensor] = {}
        for name in sorted(names, key=lambda n: -len(n.split())):
            rows = self.p.find(cond[i], name)[0] & ~taken
            if bool(rows.any()):
                spans[name], taken = rows, taken | rows
            elif self.names:
                raise BadInput(missing(self.p, text, name))
        kept = [name for name in names if name in spans]
        self.found[text] = kept
        return [spans[name] for name in kept]


def missing(p: Text2Image, text: str, name: str) -> str:
    """Why a name has no rows in the encoding of a text, in a sentence."""
    if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE):
        return (
            f"{name!r} is cut off, or part of a longer concept: the model reads {p.context_length} tokens of a prompt; "
            f"shorten {text!r}, or leave the name out"
        )
    return f"the prompt {text!r} does not have {name!r}: name words that it has, or none to take those found in it"


def _text(cond: Conditioning, i: int) -> str:
    return cond.prompts[i] if cond.prompts else ""
