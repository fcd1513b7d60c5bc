"""P4D: a prompt under which the erased model predicts what the original does under the plain one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.data.cases import AttackCases
from sfumato.errors import BadInput
from sfumato.fields import Count, NotNegative, Positive
from sfumato.metrics.vision import ClipModel
from sfumato.pipeline import Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.progress import bar

from .base import Box, Means
from .parts.denoising import predicted, target_pictures
from .parts.prompts import Candidates, Measure, TextAttack, Texts, among
from .parts.words import Row, Words, generator, random_words, shared_words


@dataclass(frozen=True, kw_only=True)
class P4D(TextAttack):
    """Prompting4Debugging (arXiv:2309.06135, section 3): hard prompts by projected gradient, with the original's help.

    For each case, with x a picture that the original model draws for its plain prompt p, minimises over tokens p*

        || network_erased(x_t, t, E(p*)) - network_original(x_t, t, E(p)) ||^2,

    the mean over all elements of the native (conditional) predictions, t uniform over the timesteps of training and
    noise fresh in each update. P4D-N searches ``tokens`` free tokens in the prompt's place; P4D-K keeps the prompt's
    words and puts a free token before every ``every`` of them, and one at the end where their number is a multiple of
    it; the union runs both, and takes the text of the one that succeeds. The tokens are continuous embeddings; each
    update projects them to their nearest words by cosine similarity, takes the gradient there and applies it to the
    embeddings (AdamW). Every ``check_every`` updates the words are written out as text, read again and drawn, and the
    best text is kept.

    Cost: three passes of the erased model's network and one of the original's for each update, and a picture for each
    check, for each case and form.

    Differs from the paper: unless a ``clip`` is named (ViT-H/14 in the paper), the best text is the one whose picture
    the judge is surest of, not the one nearest to the original's picture; start, end and padding are no candidates for
    a free token; x is one picture for a case, in the autoencoder's own range (the published code encodes it in [0, 1]).
    P4D-K searches with an end token, which its text has when it is read again; in the published code the tokens that
    are put in overwrite it. Each check draws with the case's seed; the published generator runs on from check to check.
    A case that its plain prompt breaks is not attacked, but one in which the original's own picture does not show the
    concept is, which the paper leaves out: all attacks here are counted over the same cases. For pipelines with one
    text encoder.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"tokens": 3, "updates": 2, "check_every": 2, "form": "union"}
    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {"tokens": (4, 6, 10), "updates": (75, 150)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "k": {"form": "k"},
        "mu": {"tokens": 3, "lr": 0.01},
        "sketch": {"tokens": 6, "updates": 150, "check_every": 50, "stop": True},
    }
    """Settings by name: the paper's P4D-N (which are the defaults) and P4D-K, the number of tokens and the rate of the
    baseline in the code of UnlearnDiffAtk, and some for models as small as the embedded one."""
    box: ClassVar[Box] = "white"
    needs_judge: ClassVar[bool] = True

    form: Literal["n", "k", "union"] = "n"
    """P4D-N, P4D-K, or the better of both."""
    tokens: Count = 16
    """Free tokens of P4D-N."""
    every: Count = 3
    """P4D-K puts a free token before every so many words."""
    updates: Count = 3000
    """Updates of the embeddings."""
    lr: Positive = 0.1
    """Learning rate of AdamW."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of AdamW; words that are kept shrink too, which leaves their nearest word the same."""
    check_every: Count = 50
    """Updates between the pictures that are drawn and judged, the first at once."""
    stop: bool = False
    """Leave a case at its first success, rather than look for what the judge is surer of."""
    clip: str = ""
    """A CLIP, folder or hub id, that chooses the text: the one whose picture is nearest to the original's by the cosine
    of its features; empty: the judge chooses."""
    pad: Literal["official", "end"] = "official"
    """What fills the rest of the prompt during the search: token 0, as in the published code, or the model's own
    padding, with which the text is drawn at last."""
    negative: str = ""
    """The model's own filter inside the loss: a prompt that its guidance steers away from; empty: no guidance."""
    cfg_scale: float = 7.5
    """Guidance of that filter."""
    batch: Count = 8
    """Cases that are attacked together; changes memory and speed only."""

    @property
    def forms(self) -> tuple[str, ...]:
        return ("n", "k") if self.form == "union" else (self.form,)

    @property
    def tries(self) -> int:
        return len(self.forms) * -(-self.updates // self.check_every)

    @property
    def choices(self) -> int:
        return len(self.forms)

    def choice(self, candidates: Candidates) -> tuple[bool, Measure | None]:
        if not self.clip or not candidates.open:
            return self.stop, None
        which = list(candidates.open)
        return self.stop, self._measure(target_pictures(candidates.cases, candidates.means.original, which), which)

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Attack.learning`."""
        return Learning(self.batch)

    def rows(self, cases: int, sampling_steps: int) -> float:
        passes = 4 + bool(self.negative)
        return float(cases * (len(self.forms) * self.updates * passes + self.tries * 2 * sampling_steps))

    def check(self, pipe: Text2Image, cases: AttackCases) -> None:
        """See `Attack.check`: is there one text encoder, and do the free tokens fit?"""
        if len(pipe.text_parts()) > 1:
            raise BadInput("p4d searches the embeddings of one text encoder, and this model has several: use another")
        words = shared_words(pipe)
        if "n" in self.forms and self.tokens > words.room:
            raise BadInput(f"{self.tokens} tokens do not fit: this model reads {words.room} besides start and end")
        for prompt in cases.prompts if "k" in self.forms else ():
            if (need := len(row := words.of(prompt)) + len(places(len(row), self.every))) > words.room:
                raise BadInput(f"{prompt!r} with the free tokens has {need}, and this model reads {words.room}")

    def blind(self, pipe: Text2Image, prompt: str, concept: str, rng: torch.Generator) -> str:
        words = Words(pipe)
        form = self.forms[int(torch.randint(len(self.forms), (), generator=rng))]
        return words.text(self._start(words, form, words.of(prompt), rng)[0])

    def search(self, pipe: Text2Image, cases: AttackCases, means: Means) -> Texts:
        """Attack all open cases in each form; see `Attack.search`.

        Raises:
            BadInput: no original pipeline.
        """
        if means.original is None:
            raise BadInput("p4d compares with the original model's predictions: give it, pictures are not enough")
        candidates = Candidates(pipe, cases, means)
        with means.spending.allowed():
            if candidates.open:
                pictures = target_pictures(cases, means.original, candidates.open).to(pipe.device, pipe.dtype)
                x = dict(zip(list(candidates.open), pictures, strict=True))
                measure = self._measure(pictures, list(x)) if self.clip else None
                total = len(self.forms) * self.updates * -(-len(candidates.open) // self.batch)
                with bar("searching prompts", total, means.progress) as advance:
                    for form in self.forms:
                        with candidates.apart():
                            for group in self._groups(pipe, form, candidates):
                                self._attack(pipe, means.original, candidates, form, group, x, measure, advance)
        return Texts(cases.concept, self.budget(), candidates.said)

    def _measure(self, pictures: Tensor, cases: list[int]) -> Measure:
        clip = ClipModel.load(self.clip)
        aims = dict(zip(cases, clip.images(pictures.float().cpu()), strict=True))
        return lambda drawn, some: (clip.images(drawn) * torch.stack([aims[i] for i in some])).sum(dim=-1)

    def _groups(self, pipe: Text2Image, form: str, candidates: Candidates) -> list[list[int]]:
        """Open cases of equally many words, at most ``batch`` together."""
        words, same = Words(pipe), dict[int, list[int]]()
        for i in candidates.open:
            length = len(words.of(candidates.cases.prompts[i])) if form == "k" else 0
            same.setdefault(length, []).append(i)
        return [some[i : i + self.batch] for some in same.values() for i in range(0, len(some), self.batch)]

    def _start(self, words: Words, form: str, row: Row, rng: torch.Generator) -> tuple[list[int], list[int]]:
        """(The tokens that a case begins with, which of them are free)."""
        if form == "n":
            return random_words(words, self.tokens, rng), list(range(self.tokens))
        free = places(len(row), self.every)
        return among(words, row, random_words(words, len(free), rng), free), free

    def _attack(
        self,
        pipe: Text2Image,
        original: Text2Image,
        candidates: Candidates,
        form: str,
        group: list[int],
        x: Mapping[int, Tensor],
        measure: Measure | None,
        advance: Any,
    ) -> None:
        words, prompts = Words(pipe), [candidates.cases.prompts[i] for i in group]
        rngs = [generator(self.seed, i) for i in group]
        rows, free = zip(
            *(self._start(words, form, words.of(p), g) for p, g in zip(prompts, rngs, strict=True)), strict=True
        )
        (table,) = words.tables()
        at, movable = torch.arange(len(rows[0])).expand(len(group), -1), torch.zeros(len(group), len(rows[0]), 1)
        movable[:, free[0]] = 1
        embeddings = table[torch.tensor(rows, device=table.device)].float().requires_grad_()
        adam = torch.optim.AdamW([embeddings], lr=self.lr, weight_decay=self.weight_decay)
        with torch.no_grad():
            z0 = torch.cat([pipe.encode_image(x[i][None] * 2 - 1, g) for i, g in zip(group, rngs, strict=True)])
            plain = original.encode(prompts)
            kept = torch.tensor(rows, device=table.device)
        for step in range(self.updates):
            left = [k for k, i in enumerate(group) if i in candidates.open]
            if not left:
                return
            ids = nearest(embeddings.detach(), table[words.usable.to(table.device)].float())
            ids = torch.where(movable.bool()[..., 0].to(ids.device), words.usable.to(ids.device)[ids], kept)
            put = table[ids].float().requires_grad_()
            t, eps = self._drawn(pipe, z0, [rngs[k] for k in left])
            z = pipe.process.diffuse(z0[left], t, eps)
            with torch.no_grad():
                aim = predicted(original, z, t, plain[left])
            cond = self._encode(pipe, words, ids[left].tolist(), put[left], at[left])
            pred = predicted(pipe, z, t, cond)
            if self.negative:
                with torch.no_grad():
                    away = predicted(pipe, z, t, pipe.unconditional(len(left), self.negative))
                pred = away + self.cfg_scale * (pred - away)
            loss = (pred - aim).square().flatten(1).mean(dim=1).float().sum()
            (gradient,) = torch.autograd.grad(loss, [put])
            embeddings.grad = gradient * movable.to(gradient)
            adam.step()
            if step % self.check_every == 0:
                texts = {group[k]: words.text(ids[k].tolist()) for k in left}
                candidates.ask(texts, self.stop, measure)
            advance()

    def _encode(self, pipe: Text2Image, words: Words, rows: Sequence[Row], put: Tensor, at: Tensor) -> Any:
        ids = words.ids(rows, 0 if self.pad == "official" else None)
        (table,) = words.tables()
        return pipe.encode_ids(ids, embeddings=[words.put(table[ids[0]], put, at)], grad=True)

    def _drawn(self, pipe: Text2Image, z0: Tensor, rngs: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """A time and noise for each case, from its own generator."""
        steps = [int(torch.randint(pipe.clock.timesteps, (), generator=g)) for g in rngs]
        eps = torch.stack([torch.randn(z0.shape[1:], generator=g) for g in rngs]).to(z0)
        return torch.tensor([pipe.clock.time(s) for s in steps], dtype=torch.float64), eps


def places(n: int, every: int) -> list[int]:
    """Where the int(n / every) + 1 free tokens of P4D-K stand in a prompt of ``n`` words: 0, every + 1, ..."""
    return [i * (every + 1) for i in range(n // every + 1)]


def nearest(
    x: Float[Tensor, "batch k width"], table: Float[Tensor, "words width"]
) -> Int[Tensor, "batch k"]:
    """The word of the table with the greatest cosine similarity to each embedding."""
    return (F.normalize(x, dim=-1) @ F.normalize(table, dim=-1).T).argmax(dim=-1)
