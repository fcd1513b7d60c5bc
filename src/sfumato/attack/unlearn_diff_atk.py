"""UnlearnDiffAtk: the erased model itself, used as a classifier, says which tokens make it draw the concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.data.cases import AttackCases
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive
from sfumato.pipeline import Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.progress import bar

from .base import Box, Means
from .parts.denoising import errors, target_pictures
from .parts.prompts import Candidates, TextAttack, Texts, among
from .parts.words import Words, generator, random_words, shared_words


@dataclass(frozen=True, kw_only=True)
class UnlearnDiffAtk(TextAttack):
    """UnlearnDiffAtk (arXiv:2310.11868, eq. 5 and section 4): a few tokens before the prompt, by gradient.

    A diffusion model is a classifier of its own: the prompt that explains a picture best is the one under which the
    network errs least. So for every case, with x the picture that the original model draws for its plain prompt, the
    attack minimises over k discrete tokens d

        E_{eps} || target(x, eps) - network(x_t, t, E([d, prompt])) ||^2,

    the mean over all elements in the network's native prediction (eps in the paper). Each token is a row of weights on
    the simplex over the vocabulary, uniform at first. Forward one token a row is drawn from it; backward the gradient
    passes straight through, clipped to [-1, 1] element by element. Adam with L2 weight decay, then the Euclidean
    projection on the simplex. t ascends over ``times`` steps, ``updates`` at each; after each t the likeliest tokens
    are written out as text, read again, drawn, and shown to the judge, until it sees the concept. A case that its plain
    prompt breaks is not attacked.

    Cost: at most times x updates forward and backward passes, and ``times`` pictures, for each case.

    Differs from the paper: the projection is exact (by sorting); the published code's bisection, whose tolerance is on
    the shift and leaves the sums of long rows off by some percent, is an option. The picture is drawn from the text
    that is kept, as it is read again; the published code says the same in its records.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"times": 2, "updates": 2, "lr": 0.5}
    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.01, 0.02, 0.1), "times": (8, 16), "updates": (20, 40)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "safety": {"tokens": 5},
        "sketch": {"times": 8, "updates": 40, "lr": 0.02},
    }
    """Settings by name: the paper's (which are the defaults), those of its longest task, and some for models as small
    as the embedded one."""
    box: ClassVar[Box] = "white"
    needs_judge: ClassVar[bool] = True

    tokens: Natural = 3
    """Tokens that are searched; 0 attacks nothing."""
    place: Literal["prefix", "suffix"] = "prefix"
    """Where they stand: before the prompt's words, or after."""
    times: Count = 50
    """Times t, evenly over those of training, in ascending order; after each a picture is drawn and judged."""
    updates: Count = 40
    """Updates at each time, with fresh noise."""
    lr: Positive = 0.01
    """Learning rate of Adam."""
    weight_decay: NotNegative = 0.1
    """L2 weight decay, added to the gradient."""
    projection: Literal["exact", "bisection"] = "exact"
    """How a row comes back on the simplex: exactly, or by the published code's bisection."""
    batch: Count = 8
    """Cases that are attacked together; changes memory and speed only."""

    @property
    def tries(self) -> int:
        return self.times

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Attack.learning`."""
        return Learning(self.batch)

    def rows(self, cases: int, sampling_steps: int) -> float:
        return float(cases * self.times * (3 * self.updates + 2 * sampling_steps)) if self.tokens else 0.0

    def check(self, pipe: Text2Image, cases: AttackCases) -> None:
        """See `Attack.check`: do the text encoders share a vocabulary, and do the tokens fit beside a word?"""
        if self.tokens >= (room := shared_words(pipe).room):
            raise BadInput(f"{self.tokens} tokens leave no room for a prompt: this model reads {room}, give fewer")
        if self.times > pipe.clock.timesteps:
            raise BadInput(f"times must be at most {pipe.clock.timesteps}, this model's timesteps: got {self.times}")

    def blind(self, pipe: Text2Image, prompt: str, concept: str, rng: torch.Generator) -> str:
        words = Words(pipe)
        return words.text(self._with(words, words.of(prompt), random_words(words, self.tokens, rng)))

    def search(self, pipe: Text2Image, cases: AttackCases, means: Means) -> Texts:
        """Attack all open cases, ``batch`` at a time; see `Attack.search`."""
        candidates = Candidates(pipe, cases, means)
        with means.spending.allowed():
            if self.tokens and candidates.open:
                x = target_pictures(cases, means.original, candidates.open).to(pipe.device, pipe.dtype)
                groups = [candidates.open[i : i + self.batch] for i in range(0, len(candidates.open), self.batch)]
                with bar("searching tokens", len(groups) * self.times, means.progress) as advance:
                    for group, some in zip(groups, x.split(self.batch), strict=True):
                        with torch.no_grad():
                            z0 = pipe.encode_image(some * 2 - 1)
                        self._attack(pipe, candidates, group, z0, advance)
        return Texts(cases.concept, self.budget(), candidates.said)

    def _with(self, words: Words, row: Sequence[int], put: Sequence[int]) -> list[int]:
        return among(words, list(row)[: words.room - len(put)], put, self._places(words, row))

    def _places(self, words: Words, row: Sequence[int]) -> list[int]:
        first = 0 if self.place == "prefix" else min(len(row), words.room - self.tokens)
        return list(range(first, first + self.tokens))

    def _attack(self, pipe: Text2Image, candidates: Candidates, group: list[int], z0: Tensor, advance: Any) -> None:
        words, cases = Words(pipe), candidates.cases
        prompts = [words.of(cases.prompts[i]) for i in group]
        rngs = [generator(self.seed, i) for i in group]
        rows = [self._with(words, row, words.usable[: self.tokens].tolist()) for row in prompts]
        places = torch.tensor([self._places(words, row) for row in prompts])
        weights = torch.full((len(group), self.tokens, len(words)), 1 / len(words), device=pipe.device)
        adam = torch.optim.Adam([weights.requires_grad_()], lr=self.lr, weight_decay=self.weight_decay)
        project = simplex if self.projection == "exact" else simplex_by_bisection
        for step in ascending(self.times, pipe.clock.timesteps):
            left = [k for k, i in enumerate(group) if i in candidates.open]
            if not left:
                return
            some, said = [rngs[k] for k in left], [rows[k] for k in left]
            t = torch.full((len(left),), pipe.clock.time(step), dtype=torch.float64)
            for _ in range(self.updates):
                mixed = sampled(weights[left], some)
                eps = torch.stack([torch.randn(z0.shape[1:], generator=g) for g in some]).to(z0)
                loss = errors(pipe, z0[left], t, eps, words.encode(said, mixed, places[left])).float().sum()
                (weights.grad,) = torch.autograd.grad(loss, [weights])
                adam.step()
                with torch.no_grad():
                    weights[left] = project(weights[left])
            best = weights.detach().argmax(dim=-1).tolist()
            candidates.ask({group[k]: words.text(self._with(words, prompts[k], best[k])) for k in left})
            advance()


def ascending(times: int, timesteps: int) -> list[int]:
    """``times`` timesteps in ascending order, each in the middle of its share: 10, 30, ... 990 for 50 of 1,000."""
    return [(2 * i + 1) * timesteps // (2 * times) for i in range(times)]


class _Straight(torch.autograd.Function):
    """One-hot rows forward; backward the gradient as it comes, clipped to [-1, 1] element by element."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, rngs: list[torch.Generator]) -> Tensor:
        drawn = [torch.multinomial(w.cpu(), 1, generator=g)[:, 0] for w, g in zip(weights, rngs, strict=True)]
        return F.one_hot(torch.stack(drawn), weights.shape[-1]).to(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return F.hardtanh(gradients[0]), None


def sampled(
    weights: Float[Tensor, "batch k words"], rngs: list[torch.Generator]
) -> Float[Tensor, "batch k words"]:
    """For each row a word drawn with these weights, as a one-hot row, straight-through (section 4 of the paper).

    Args:
        rngs: a CPU generator for each of the batch.
    """
    return _Straight.apply(weights, rngs)


def simplex(rows: Float[Tensor, "... words"]) -> Float[Tensor, "... words"]:
    """The nearest point of {0 <= p, sum p = 1}: clip(p - mu, 0), with mu found by sorting (exact)."""
    order = rows.sort(dim=-1, descending=True).values
    excess = order.cumsum(dim=-1) - 1
    count = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    active = (order * count > excess).sum(dim=-1, keepdim=True)
    return (rows - excess.gather(-1, active - 1) / active).clamp(min=0)


def simplex_by_bisection(rows: Float[Tensor, "... words"], tolerance: float = 1e-5) -> Float[Tensor, "... words"]:
    """The same by halving the interval in which mu lies until it is shorter than ``tolerance``.

    Entries are right to the tolerance, or to the precision of ``rows`` where that is coarser; the sum to that times the
    number of entries that are not zero.
    """
    kept = rows.clamp(0, 1)
    fits = (kept.sum(dim=-1, keepdim=True) - 1).abs() <= tolerance
    low, high = rows.amin(dim=-1, keepdim=True) - 1, rows.amax(dim=-1, keepdim=True)
    middle = halved = (low + high) / 2
    # Beyond 128 float32 has no numbers as near to each other as the tolerance: what cannot be halved is left.
    while bool((going := (high - low > tolerance) & (low < halved) & (halved < high)).any()):
        middle = torch.where(going, halved, middle)
        over = (rows - middle).clamp(0, 1).sum(dim=-1, keepdim=True) > 1
        low, high = torch.where(going & over, middle, low), torch.where(going & ~over, middle, high)
        halved = (low + high) / 2
    return torch.where(fits, kept, (rows - middle).clamp(0, 1))
