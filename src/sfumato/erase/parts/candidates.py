"""Words near a concept, spread over their distance to it: what a search over words chooses from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pairwise_distance

from sfumato.pipeline import Conditioning, Text2Image
from sfumato.train.recipe import Loose

Similarity = Literal["l2", "cosine"]
VOCABULARY = 3000
"""Words that are taken from a tokenizer: as many as the list of EAP's paper has."""
_FOREIGN = re.compile(r"[^a-z</>]")
CHUNK = 64
"""Words that are encoded at once."""


def similarity(
    concept: Float[Tensor, "dim"], words: Float[Tensor, "words dim"], kind: Similarity = "l2"
) -> Float[Tensor, "words"]:
    """How near the flattened embeddings of words are to the concept's: minus their distance, or the cosine.

    As published: 1e-6 is added to every difference before the distance is taken.
    """
    if kind == "cosine":
        return cosine_similarity(concept[None], words, dim=-1)
    return -pairwise_distance(concept[None], words)


def line_centres(values: Float[Tensor, "n"], k: int) -> Float[Tensor, "k"]:
    """The centres of the best k-means of numbers on a line, ascending, in float64.

    Exact, by dynamic programming: of sorted numbers every cluster is a run, and the least sum of squares of m clusters
    up to number j is the least over where the last one begins. O(k n^2).

    Args:
        k: clusters, from 1 to n.
    """
    x = values.double().sort().values
    n = len(x)
    x0 = x.mean()  # sums of squares lose fewer digits about the mean
    sums = torch.cat([x.new_zeros(1), (x - x0).cumsum(0)])
    squares = torch.cat([x.new_zeros(1), (x - x0).square().cumsum(0)])
    first, last = torch.arange(n, device=x.device)[:, None], torch.arange(n, device=x.device)[None]
    size, total, square = (last - first + 1).clamp(1), sums[1:] - sums[:-1, None], squares[1:] - squares[:-1, None]
    cost = torch.where(first <= last, square - total**2 / size, torch.inf)  # of the run from first to last
    best, begins = cost[0], []
    for _ in range(1, k):
        best, begin = (torch.cat([best.new_full((1,), torch.inf), best[:-1]])[:, None] + cost).min(dim=0)
        begins.append(begin)
    ends, centres = n, []
    for begin in [*reversed(begins), None]:
        start = 0 if begin is None else int(begin[ends - 1])
        centres.append(x[start:ends].mean())
        ends = start
    return torch.stack(centres[::-1])


def spread(similarities: Float[Tensor, "words"], nearest: int, centres: int) -> list[int]:
    """Of the ``nearest`` most similar words those next to each of so many centres, the most similar first.

    The centres are those of the similarities alone: the words spread over how near they are, not over directions.
    None where ``centres`` is 0 or there are no more words than centres: then all of the nearest.
    """
    order = similarities.sort(descending=True, stable=True).indices[:nearest]
    if centres < 1 or len(order) <= centres:
        return order.tolist()
    values = similarities[order].double()
    away = (values[None] - line_centres(values, centres)[:, None]).abs()
    return [int(order[i]) for i in sorted(set(away.argmin(dim=1).tolist()))]


def legible(words: Sequence[str]) -> list[str]:
    """The words of the letters a to z alone (and < / >, as in tokens), each once; so no entry of several words."""
    return [w for w in dict.fromkeys(words) if w and not _FOREIGN.search(w.lower())]


def vocabulary(pipe: Text2Image) -> list[str]:
    """The words that a model says it knows; of others the first 3000 whole words of the (first) tokenizer.

    Tokenizers number their tokens by how often they came in their corpus.
    """
    if known := [w for words in pipe.vocabulary.values() for w in words]:
        return known
    ids = sorted(pipe.tokenizers[0].get_vocab().items(), key=lambda item: item[1])
    whole = (_whole(token) for token, _ in ids)
    return list(dict.fromkeys(w for w in whole if len(w) > 1 and w.isascii() and w.isalpha()))[:VOCABULARY]


def _whole(token: str) -> str:
    """The word that a token stands for, in lower case; empty for a piece of one."""
    if token.endswith("</w>"):
        return token.removesuffix("</w>").lower()
    return token[1:].lower() if token[:1] in ("\u2581", "\u0120") else ""


def similarities(
    concepts: Sequence[str], words: Sequence[str], kind: Similarity, encode: Callable[[list[str]], Conditioning]
) -> Float[Tensor, "concepts words"]:
    """`similarity` of every concept to every word; embeddings are made some at a time, and not kept."""
    flat: Callable[[list[str]], Tensor] = lambda some: encode(some).tokens.flatten(1).float()
    told, rows = flat(list(concepts)), [torch.zeros(len(concepts), 0)]
    for start in range(0, len(words), CHUNK):
        some = flat(list(words[start : start + CHUNK]))
        rows.append(torch.stack([similarity(c, some, kind) for c in told]).cpu())
    return torch.cat(rows, dim=1)


def allowed(
    words: Sequence[str],
    away: Float[Tensor, "concepts words"],
    concepts: Sequence[str],
    exclude: Sequence[str] = (),
    radius: float | None = None,
) -> list[int]:
    """The places of the words that may be preserved while the concepts are erased.

    Args:
        away: the distance of each word from each concept.
        exclude: words that may not.
        radius: None, or what keeps the concepts, their plurals, and words nearer to one than this share of the median
            distance from it, from being preserved.
    """
    out = {w.strip().lower() for w in exclude}
    inside = torch.zeros(len(words), dtype=torch.bool)
    if radius is not None:
        out |= {c.strip().lower() + ending for c in concepts for ending in ("", "s", "es")}
        if words:
            inside = (away < radius * away.median(dim=1, keepdim=True).values).any(dim=0)
    return [i for i, w in enumerate(words) if w.lower() not in out and not inside[i]]


class Words(Loose):
    """The logits of each concept's candidates, and what happened to these: all that a checkpoint needs of a search."""

    def __init__(self, candidates: Sequence[Sequence[str]]):
        super().__init__(nn.Parameter(torch.full((len(some),), 1 / len(some))) for some in candidates)
        self.candidates = [list(some) for some in candidates]
        for i, some in enumerate(candidates):
            # Times preserved, first and last update of these, looks of the search, sum of the drifts seen.
            self.register_buffer(f"seen_{i}", torch.tensor([[0.0, -1.0, -1.0, 0.0, 0.0]]).repeat(len(some), 1))

    @property
    def logits(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def seen(self, concept: int) -> Float[Tensor, "words 5"]:
        return self.get_buffer(f"seen_{concept}")

    @torch.no_grad()
    def preserve(self, rows: Sequence[int], picks: Sequence[Tensor], update: int) -> None:
        """Note that the likeliest words of ``picks`` are preserved in this update, for the concepts ``rows``."""
        for row, pick in zip(rows, picks, strict=True):
            seen = self.seen(row)[int(pick.argmax())]
            seen[1] = update if seen[0] == 0 else seen[1]
            seen[0] += 1
            seen[2] = update

    @torch.no_grad()
    def look(self, rows: Sequence[int], picks: Sequence[Tensor], drift: Float[Tensor, "batch"]) -> None:
        """Note how far the words of ``picks`` had drifted."""
        for row, pick, far in zip(rows, picks, drift, strict=True):
            self.seen(row)[int(pick.argmax()), 3:] += torch.stack([torch.ones_like(far), far.detach()]).float()

    def told(self, concept: int) -> list[dict[str, Any]]:
        """The candidates of a concept, the highest logits first, with what happened to each (JSON types)."""
        rows = []
        logits = self.logits[concept].tolist()
        for word, logit, seen in zip(self.candidates[concept], logits, self.seen(concept).tolist(), strict=True):
            times, first, last, looks, far = seen
            when = {"first": int(first), "last": int(last)} if times else {"first": None, "last": None}
            drift = far / looks if looks else None
            rows.append({"word": word, "logit": logit, "preserved": int(times), **when, "drift": drift})
        return sorted(rows, key=lambda row: -row["logit"])
