"""EAP: erases, and preserves the words that a search finds to suffer most from it (arXiv:2410.15618)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss, one_hot

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.text import counted
from sfumato.train.draw import Share
from sfumato.train.recipe import Loss, Turn

from .esd import SUBSETS, Variant, negative_guidance_target
from .parts.candidates import Similarity, Words, allowed, legible, similarities, spread, vocabulary
from .parts.finetune import ByGradient, InTurns, make_plan, seeds, uniform
from .parts.words import encode_words

if TYPE_CHECKING:
    from sfumato.plan import Plan

SHOWN = 10
"""Words that the report names for each concept."""


def gumbel_softmax(
    logits: Float[Tensor, "*batch words"], temperature: float, hard: bool, generator: torch.Generator | None = None
) -> Float[Tensor, "*batch words"]:
    """softmax((logits + g) / temperature), g = -log(-log(u + 1e-10) + 1e-10), u uniform in [0, 1).

    Args:
        hard: forward exactly one word, the likeliest; backward the soft Jacobian all the same.
        generator: on the CPU; ``u`` is one draw of the logits' shape and type.
    """
    u = torch.rand(logits.shape, generator=generator, dtype=logits.dtype).to(logits.device)
    soft = ((logits - torch.log(-torch.log(u + 1e-10) + 1e-10)) / temperature).softmax(dim=-1)
    if not hard:
        return soft
    return one_hot(soft.argmax(dim=-1), soft.shape[-1]).to(soft) + (soft - soft.detach())


def erasing_loss(
    erased: Float[Tensor, "batch *dims"],
    neutral: Float[Tensor, "batch *dims"],
    concept: Float[Tensor, "batch *dims"],
    eta: float,
) -> Float[Tensor, ""]:
    """mse(erased, neutral - eta (concept - neutral)): L_erase, of predictions of x0.

    It is sigma^2 / alpha^2 times the same error of predictions of eps: of Stable Diffusion's 50 steps 172 times at the
    noisiest, and 0.002 times at the last.

    Args:
        erased: the student's prediction for the concept.
        neutral, concept: the original's for the empty prompt (or the anchor), and for the concept.
    """
    return mse_loss(erased, negative_guidance_target(neutral, concept, eta))


def preserving_loss(
    kept: Float[Tensor, "batch *dims"], original: Float[Tensor, "batch *dims"]
) -> Float[Tensor, "batch"]:
    """|kept - original|^2, a mean for each row: L_keep of predictions of x0 for the words found."""
    return (kept - original).square().flatten(1).mean(dim=1)


def mixed(words: Conditioning, weights: Float[Tensor, "batch words"]) -> Conditioning:
    """Embeddings sum_w weights_w e(w), differentiable in the weights; all else is the likeliest word's.

    Rows that are no padding for some word with weight are none in the mixture.
    """
    like = words[weights.argmax(dim=1).cpu()]
    mix = lambda x: (weights.to(x) @ x.flatten(1)).unflatten(1, x.shape[1:])
    mask = ((weights.detach() > 0).float() @ words.mask.float()) > 0
    pooled = None if words.pooled is None else mix(words.pooled)
    return like.replace(tokens=mix(words.tokens), pooled=pooled, mask=mask, prompts=("",) * len(weights))


@dataclass(frozen=True, kw_only=True)
class EAP(ByGradient):
    """Adversarial preservation (arXiv:2410.15618): min over weights, max over words, of L_erase + lambda L_keep.

    Once for each concept: of a vocabulary the ``nearest`` words to the concept, thinned out to ``centres`` that spread
    over the distance to it, are the candidates. Then two steps alternate, each on latents of its own that the student
    reaches under guidance, after i of S steps, from one and the same noise for the concept and for the word. A step of
    the weights is ESD's, in x0 (`erasing_loss`), and holds the student to the original on one word
    (`preserving_loss`), drawn by Gumbel-softmax from the concept's logits. A step of the search moves these logits to
    the words on which the student has drifted most. Several concepts: one drawn at random for each row of a batch.

    The log says what was found: for each candidate its logit, how often and when it was preserved, and how far it had
    ``drift``ed (mean squared error of x0) when the search looked at it. The words with the highest logits, which are
    what the search found, stand in the report.

    Cost: per update about 2 (S - 1) network passes for the latents of the weights' step, (S - 1) for each step of the
    search, and 13 more: about 3 times ESD's with one search. Candidates are encoded once, the vocabulary in passing.

    Differs from the paper: words that are the concept itself are no candidates (``radius``, ``exclude``; the paper
    excludes nothing, see the preset "paper"). The paper's list of 3000 English words is not part of this package: by
    default it is the words that a model says it knows, or the 3000 most frequent whole words of its tokenizer. k-means
    on a line is solved exactly, where the published code starts it at random. t is the time of the latents, for the
    network and for x0 (the published code samples two of the 50 steps further and draws t at random near by).
    ``preserve`` adds prompts to every concept's candidates.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {
        "lr": (3e-4, 1e-3), "updates": (80, 150), "keep_weight": (0.3, 1.0, 3.0),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"radius": None},
        "nudity": {"variant": "u", "nearest": 2000, "centres": 50},
        "sketch": {
            "updates": 80, "lr": 1e-3, "batch": 4, "sampling_steps": 10, "word_lr": 0.1, "temperature": 1.0,
        },
    }  # fmt: skip
    """Settings by name: the published ones with nothing excluded; those of the published script for unsafe words, which
    trains what ESD-u does; and some for models as small as the embedded one (the first that were tried)."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"updates": 2, "sampling_steps": 2, "lr": 1e-3}

    variant: Variant = "x"
    """What is trained, as for ESD: cross-attention; all but cross-attention, time embedding and output; all; the
    cross-attention's keys and values; self-attention."""
    eta: float = 1.0
    """Strength of the negative guidance, in the paper's convention (see ESD)."""
    keep_weight: NotNegative = 1.0
    """lambda: weight of the word preserved."""
    updates: Count = 1000
    """T: steps of the weights."""
    lr: Positive = 1e-5
    """Learning rate of Adam for the weights."""
    batch: Count = 1
    """Latents in a step; they share the time."""
    searches: Natural = 1
    """N - 1: steps of the search after each step of the weights; 0: words are drawn uniformly."""
    word_lr: Positive = 1e-2
    """Learning rate of Adam for the words' logits."""
    temperature: Positive = 2.0
    """tau of Gumbel-softmax."""
    hard: bool = True
    """Preserve one word at a time (straight-through) and not a mixture of all."""
    vocabulary: tuple[str, ...] = ()
    """Words to choose from, of the letters a to z; none: the model's own (see above)."""
    nearest: Count = 1000
    """K: as many words, those nearest to the concept, are looked at."""
    centres: Natural = 100
    """n: as many of them are candidates, spread over their distance to the concept; 0: all."""
    similarity: Similarity = "l2"
    """What nearest means, of the embeddings of all tokens in a row."""
    radius: NotNegative | None = 0.5
    """No candidates are the concepts, their plurals, and words nearer than this share of the vocabulary's median
    distance to a concept; None excludes nothing."""
    exclude: tuple[str, ...] = ()
    """More words that are no candidates, such as the concept's synonyms."""
    start_guidance: float = 3.0
    """Guidance under which the latents are sampled."""
    sampling_steps: Count = 50
    """S: DDIM steps of a whole trajectory."""

    def __post_init__(self) -> None:
        super().__post_init__()

    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """A pipeline that shares all but the trained weights with ``pipe``; losses of both steps, and the words."""
        student = pipe.copy(own=SUBSETS[self.variant])
        words = Words(self.candidates(pipe))
        erase, search = self.losses(pipe, student, words)
        adam = partial(torch.optim.Adam, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        turns = [Turn(name="weights", loss=erase, trains=["network"], optimizer=adam)]
        if self.searches:
            plain = partial(torch.optim.Adam, betas=self.betas, eps=self.eps)
            times: dict[str, Any] = {"trains": ["words"], "clip_norm": 0.0, "times": self.searches}
            turns.append(Turn(name="words", loss=search, optimizer=plain, lr=self.word_lr, **times))
        modules = {"network": student.network, "words": words}
        recipe = InTurns(f"eap-{self.variant}", self.concepts, pipe, modules, turns)
        history = self.course(recipe, pipe, None if folder is None else folder / "training")
        found = {c: words.told(i) for i, c in enumerate(self.concepts)}
        return student, {
            "losses": history["weights/loss" if self.searches else "loss"],
            "search_losses": history.get("words/loss", []),
            "words": found,
            "found": {f"words found while erasing {c}": [w["word"] for w in some[:SHOWN]] for c, some in found.items()},
        }

    def candidates(self, pipe: Text2Image) -> list[list[str]]:
        """For each concept the words to choose from, the nearest first, and then the prompts of ``preserve``.

        Raises:
            BadInput: the tokenizer cannot read a word that was given, or none is left.
        """
        given = legible(self.vocabulary or vocabulary(pipe))
        encode = partial(encode_words, pipe) if self.vocabulary else pipe.encode
        near = similarities(self.concepts, given, self.similarity, lambda some: pipe.as_seen(encode(some)))
        away = -near if self.similarity == "l2" else 1 - near
        outside = allowed(given, away, self.concepts, self.exclude, self.radius)
        kept = list(self.preserve or ())
        if kept:
            encode_words(pipe, kept)
        found = []
        for concept, row in zip(self.concepts, near, strict=True):
            words = [given[outside[i]] for i in spread(row[outside], self.nearest, self.centres)]
            found.append(words + [k for k in kept if k not in words])
            if not found[-1]:
                raise BadInput(f"no word is left to preserve while {concept!r} is erased: give some as vocabulary")
        return found

    def losses(self, teacher: Text2Image, student: Text2Image, words: Words) -> tuple[Loss, Loss]:
        """The losses of a step of the weights, and of one of the search. Prompts are encoded here, once."""
        concept = teacher.encode(self.concepts)
        neutral = teacher.encode([self.anchor_for(i, "") for i in range(len(self.concepts))])
        known = [teacher.encode(some) for some in words.candidates]
        guidance = {"cfg_scale": self.start_guidance, "negative": teacher.unconditional()}
        process, kind = teacher.process, teacher.prediction

        def drawn(rng: Share) -> tuple[slice, list[int], int, list[int], list[Tensor]]:
            """All that is random in a step, for the whole batch; the share's rows of it."""
            (generator,) = rng.generators(len(rng.rows), range(1))  # the same for all shares
            rows = torch.randint(len(concept), (self.batch,), generator=generator).tolist()
            i, starts = uniform(self.sampling_steps, generator), seeds(self.batch, generator)
            picks = [gumbel_softmax(words.logits[r], self.temperature, self.hard, generator) for r in rows]
            return slice(rng.rows.start, rng.rows.stop), rows, i, starts, picks

        def told(rows: Sequence[int], picks: Sequence[Tensor]) -> Conditioning:
            return Conditioning.cat([mixed(known[r], q[None]) for r, q in zip(rows, picks, strict=True)])

        def walked(cond: Conditioning, starts: list[int], i: int) -> tuple[Tensor, float]:
            options = {"sampling_steps": self.sampling_steps, "stop_after": i, **guidance}
            return student.trajectory(cond.map(Tensor.detach), starts, **options)

        def predicted(pipe: Text2Image, z: Tensor, t: float, conds: list[Conditioning]) -> tuple[Tensor, ...]:
            made = process.convert(pipe.denoiser(z, t, Conditioning.cat(conds)), z, t, kind, "x0")
            return made.chunk(len(conds))

        def erase(batch: dict[str, int], rng: Share) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                share, rows, i, starts, picks = drawn(rng)
            if share.start == 0:
                words.preserve(rows, picks, batch["step"])
            rows, starts, picks = rows[share], starts[share], picks[share]
            asked, kept = concept[rows], told(rows, picks)
            both, t = walked(Conditioning.cat([asked, kept]), starts * 2, i)
            z, z_kept = both.chunk(2)
            with torch.no_grad():
                x0, xc, original = predicted(teacher, torch.cat([z, z, z_kept]), t, [neutral[rows], asked, kept])
            erased, held = predicted(student, both, t, [asked, kept])
            lost, drift = erasing_loss(erased, x0, xc, self.eta), preserving_loss(held, original).mean()
            return lost + self.keep_weight * drift, {"erase": lost, "keep": drift}

        def search(batch: dict[str, int], rng: Share) -> tuple[Tensor, dict[str, Tensor]]:
            share, rows, i, starts, picks = drawn(rng)
            rows, picks = rows[share], picks[share]
            kept = told(rows, picks)
            z, t = walked(kept, starts[share], i)
            with torch.no_grad():
                (original,) = predicted(teacher, z, t, [kept])
            (held,) = predicted(student, z, t, [kept])
            drift = preserving_loss(held, original)
            words.look(rows, picks, drift)
            return -drift.mean(), {}

        return erase, search

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Eraser.learning`."""
        return Learning(2 * self.held(self.batch), SUBSETS[self.variant])

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network; encoding the vocabulary is left out."""
        trained = sum(p.numel() for p in pipe.parameters(SUBSETS[self.variant]).values())
        walk = self.sampling_steps - 1  # guided: two rows for half of the steps
        passes = self.updates * self.batch * (2 * walk + 9 + self.searches * (walk + 4))
        title = f"EAP-{self.variant}: {', '.join(self.concepts)}, {counted(self.updates, 'update')}"
        return make_plan(pipe, title, trained, passes)
