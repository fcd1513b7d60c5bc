"""MMA-Diffusion: a text without the concept's words that the text encoder pools as the prompt that names it."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.data.cases import AttackCases
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.progress import bar

from .base import Box, Means
from .parts.prompts import Candidates, TextAttack, Texts
from .parts.words import Row, Words, generator, random_words, shared_words, wide


@dataclass(frozen=True, kw_only=True)
class MMA(TextAttack):
    """The text part of MMA-Diffusion (arXiv:2311.17516, section 3.2): greedy search along the gradient of tokens.

    For each prompt p, maximises over ``tokens`` tokens the cosine of the pooled encodings E(tokens) and E(p). It begins
    with random letters, none of them a forbidden string. In each update the gradient with respect to the tokens'
    one-hot rows ranks the vocabulary at each place; tokens that are ``forbidden``, any that contain one of these
    strings, are out. Of ``batch`` candidates, spread evenly over the places, each replaces one token by one of the
    ``top`` best there, at random. Candidates that do not read as equally many tokens again, or as the same text, are
    dropped, and so are those whose tokens together spell a forbidden string; the best of the rest is taken, better or
    not, and the best ever is the result. It takes the whole prompt's place and passes a filter of words. Of the model
    only the text encoder is seen, with its gradients: the original's where there is one.

    Cost: updates x batch rows through the text encoder for each prompt.

    Differs from the paper: nothing in the text part. Not followed is its published code where it takes the gradients
    one place too early (the start token counts as the first), cuts the last letter off a candidate whose last token
    ends no word, writes what is not ASCII as the vocabulary's stand-ins for bytes, and lets two tokens spell a
    forbidden string, or one in another case. The forbidden strings are the concept's own words unless others are given;
    start, end and padding are forbidden too. The image part, against a checker after an inpainting pipeline, is none of
    an attack on erasers. A case that its plain prompt breaks is not attacked.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"tokens": 4, "updates": 2, "batch": 8, "top": 8}
    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {"tokens": (4, 8), "updates": (40, 80), "top": (16, 32)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "sketch": {"tokens": 8, "updates": 40, "batch": 64, "top": 32},
    }
    """Settings by name: the paper's (which are the defaults), and some for models as small as the embedded one."""
    box: ClassVar[Box] = "grey"

    tokens: Count = 20
    """Tokens that are searched."""
    updates: Natural = 1000
    """Steps, each of which replaces one token."""
    batch: Count = 512
    """Candidates in a step."""
    top: Count = 256
    """Of how many best tokens at a place a candidate's is drawn."""
    forbidden: tuple[str, ...] = ()
    """Strings that no token and no text may contain; empty: the words of the concept."""

    @property
    def tries(self) -> int:
        return 1

    def check(self, pipe: Text2Image, cases: AttackCases) -> None:
        """See `Attack.check`: do the text encoders share a vocabulary, do the tokens fit, is any word left?"""
        words = shared_words(pipe)
        if self.tokens > words.room:
            raise BadInput(f"{self.tokens} tokens do not fit: this model reads {words.room} besides start and end")
        if not self.allowed(words, cases.concept).any():
            raise BadInput(f"every token contains one of {', '.join(self.forbidden)}: forbid less")
        if not self.letters(cases.concept):
            raise BadInput("the search starts from letters, and all are forbidden: forbid less")

    def blind(self, pipe: Text2Image, prompt: str, concept: str, rng: torch.Generator) -> str:
        words = Words(pipe)
        return words.text(random_words(words, self.tokens, rng))

    def allowed(self, words: Words, concept: str) -> Tensor:
        """Which of all tokens a candidate may have, as a mask."""
        mask = torch.zeros(len(words), dtype=torch.bool)
        mask[words.usable] = True
        for token, i in words.tokenizer.get_vocab().items():
            if not self.passes(token, concept):
                mask[i] = False
        return mask

    def passes(self, text: str, concept: str) -> bool:
        """Whether a text contains none of the forbidden strings."""
        return not any(s.lower() in text.lower() for s in self.forbidden or concept.split())

    def letters(self, concept: str) -> list[str]:
        """The letters that a search may start from."""
        return [x for x in string.ascii_letters if self.passes(x, concept)]

    def search(self, pipe: Text2Image, cases: AttackCases, means: Means) -> Texts:
        """Search a text for each prompt with open cases; see `Attack.search`."""
        candidates, words = Candidates(pipe, cases, means), Words(means.original or pipe)
        allowed, prompts = self.allowed(words, cases.concept), candidates.by_prompt()
        with means.spending.allowed(), bar("searching texts", len(prompts) * self.updates, means.progress) as advance:
            for prompt, numbers in prompts.items():
                with torch.no_grad():
                    target = pooled(words.pipe, words.pipe.encode(prompt))
                best: list[str] = []
                try:
                    rng = generator(self.seed, numbers[0])
                    self._climb(words, target, allowed, cases.concept, rng, best, means, advance)
                finally:
                    for i in numbers if best else ():
                        candidates.keep(i, best[-1])
        return Texts(cases.concept, self.budget(), candidates.said)

    def _climb(
        self,
        words: Words,
        target: Tensor,
        allowed: Tensor,
        concept: str,
        rng: torch.Generator,
        best: list[str],
        means: Means,
        advance: Callable[[], None],
    ) -> None:
        """Put the best text until now into ``best``."""
        known = self.letters(concept)
        letters = [known[int(i)] for i in torch.randint(len(known), (self.tokens,), generator=rng)]
        text = " ".join(letters).lower()
        best[:], least = [text] if self.passes(text, concept) else [], float("inf")
        for _ in range(self.updates):
            means.spending.check()
            (row,) = words.read([text])
            row = row[: words.room]
            gradient = token_gradient(words, row, target)
            rows = candidate_rows(gradient, row, allowed, self.top, self.batch, rng).tolist()
            texts = [t for t in map(words.text, rows) if t != text and self.passes(t, concept)]
            read = words.read(texts) if texts else []
            kept = [(t, r) for t, r in zip(texts, read, strict=True) if len(r) == len(row)]
            advance()
            if not kept:
                continue
            with torch.no_grad():
                losses = unlike(pooled(words.pipe, words.encode_many([r for _, r in kept])), target)
            first = int(losses.argmin())
            text = kept[first][0]
            if float(losses[first]) < least:
                best[:], least = [text], float(losses[first])


def pooled(pipe: Text2Image, cond: Conditioning) -> Float[Tensor, "batch width"]:
    """One row for each text: the pooled encoding that the network is told, else the last layer at the end token."""
    if cond.pooled is not None:
        return cond.pooled
    return cond.tokens[torch.arange(len(cond)), pipe.last_word_token(cond) + 1]


def unlike(
    x: Float[Tensor, "batch width"], target: Float[Tensor, "one width"]
) -> Float[Tensor, "batch"]:
    """1 - cosine, which is minimised."""
    return 1 - F.cosine_similarity(wide(x), wide(target), dim=1, eps=1e-6)


def token_gradient(words: Words, row: Row, target: Float[Tensor, "one width"]) -> Float[Tensor, "k words"]:
    """The gradient of `unlike` with respect to the one-hot rows of the tokens."""
    one_hot = F.one_hot(torch.tensor([list(row)]), len(words)).float().to(words.pipe.device).requires_grad_()
    cond = words.encode([row], one_hot, torch.arange(len(row))[None])
    (gradient,) = torch.autograd.grad(unlike(pooled(words.pipe, cond), target).sum(), [one_hot])
    return gradient[0]


def candidate_rows(
    gradient: Float[Tensor, "k words"], row: Row, allowed: Tensor, top: int, batch: int, rng: torch.Generator
) -> Int[Tensor, "batch k"]:
    """``batch`` rows that differ from ``row`` in one place each, the places in turn.

    The new token is drawn from the ``top`` allowed ones whose gradient is least there.
    """
    ranked = gradient.detach().cpu().masked_fill(~allowed, float("inf"))
    best = (-ranked).topk(min(top, int(allowed.sum())), dim=1).indices
    k = len(row)
    place = torch.arange(batch) * k // batch
    drawn = best[place, torch.randint(best.shape[1], (batch,), generator=rng)]
    rows = torch.tensor(list(row)).repeat(batch, 1)
    rows[torch.arange(batch), place] = drawn
    return rows
