"""Concept inversion: learn a new word on the erased pipeline from pictures of what it no longer draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.data.cases import AttackCases, say
from sfumato.data.templates import PLAIN, PUBLISHED, Kind
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive, Share
from sfumato.files import tensors_sha256
from sfumato.memory import require_memory
from sfumato.pipeline import Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.pipeline.tokens import LearnedToken
from sfumato.train.loop import Run
from sfumato.train.recipe import Loose, Recipe
from sfumato.train.schedule import Tuning
from sfumato.train.words import Latents, check_length, denoising_loss, encode_once, latents_of, neutral_word

from .base import Attack, Box, Found, Means


@dataclass(frozen=True, kw_only=True)
class ConceptInversion(Tuning, Attack):
    """Textual inversion against an erased pipeline (arXiv:2308.01508, section 4; the learning rule
    arXiv:2208.01618).

    With everything else frozen, learns the embedding v* of new tokens that minimises

        E_{x, template, eps, t} || target(x, eps) - network(x_t, t, E(template with v*)) ||^2,

    the mean over all elements in the network's native prediction (eps in the papers), t uniform over the
    timesteps of training. AdamW changes the new rows only. As in the published script x is a fresh draw from the
    autoencoder's posterior every time, mirrored every other time, and the template one of textual inversion's. The
    concept counts as recovered where a detector finds it in pictures of prompts that say v* instead of its name.

    Cost: ``updates`` forward and backward passes of network and text encoder, without gradients of any weight; the
    autoencoder encodes each picture once, and once mirrored.

    Differs from the paper: gradients are taken for the new rows alone instead of restoring all others after
    each step, which is the same update; pictures are drawn with replacement, not in shuffled rounds; the posterior
    of a mirrored picture is encoded beforehand and only drawn from in each step, which is the same; the default init
    word is a neutral one, so that the attacker is not helped by a name; ``captions`` is ours. Against erasers that
    only guide (SLD), of which there is none here, the published script has their guidance in the loss. The preset of
    the embedded model learns from captions, which say left and right and therefore allow no mirroring, and from the
    posterior's mean, on which that model was trained; its phrases have no words that the model does not know.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "n_images": 2, "updates": 3, "lr": 0.05, "batch": 2, "checkpoint_every": 1,
        "init_word": "circle", "templates": ("a photo of {}", "{}"),
    }  # fmt: skip
    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (5e-3, 2e-2, 6e-2), "updates": (60, 120, 240)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "sketch": {
            "updates": 120, "lr": 0.02, "batch": 8, "captions": True, "templates": PLAIN, "flip": 0.0,
            "sample_posterior": False,
        },
    }
    """Settings by name: the paper's (which are the defaults), and some for models as small as the embedded one."""
    box: ClassVar[Box] = "white"
    looks_first: ClassVar[bool] = False

    n_images: Count = 25
    """Pictures of the concept that the original pipeline draws, when none are given."""
    updates: Natural = 5000
    """Updates: 5,000 against fine-tuned pipelines, 1,000 against guidance-based erasure."""
    lr: Positive = 0.08
    """Learning rate of AdamW: the paper's 5e-3, scaled by batch (4) and accumulation (4)."""
    batch: Count = 16
    """Pictures (each with its noise, time and template) in an update."""
    weight_decay: NotNegative = 1e-2
    """Decoupled weight decay of AdamW, on the new rows only."""
    checkpoint_every: Count = 250
    tokens: Natural = 1
    """New tokens that together stand for the concept; 0 attacks nothing and asks by the concept's name."""
    init_word: str = ""
    """A text whose mean token embedding the new ones start from; empty: object, shape, art, ..., whatever is
    the first that is one token of the model."""
    kind: Kind = "object"
    """Which of the published templates are learned with: 27 of objects, 19 of styles or 2 of persons."""
    templates: tuple[str, ...] = ()
    """Phrases with {} where the new word stands, instead of the published ones of ``kind``."""
    flip: Share = 0.5
    """How often a picture is mirrored."""
    sample_posterior: bool = True
    """Draw from the autoencoder's posterior anew each time; else its mean is learned from."""
    captions: bool = False
    """Learn from each picture's own prompt, where known, with the concept replaced by the new word, not from
    templates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any("{}" not in t for t in self.templates):
            raise BadInput('every template needs {} where the new word stands, for example "a photo of {}"')

    @property
    def phrases(self) -> tuple[str, ...]:
        """The templates: those that were given, or the published ones."""
        return self.templates or PUBLISHED[self.kind]

    @property
    def learns_from(self) -> int:
        return self.n_images

    def check(self, pipe: Text2Image, cases: AttackCases) -> None:
        """See `Attack.check`: do the new tokens fit into the templates and the prompts, in place of the concept?"""
        prompts = [*cases.prompts, *(cases.captions or ())]
        check_length(pipe, [*self.phrases, *(say(p, cases.concept, "{}") for p in prompts)], self.tokens)

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Attack.learning`."""
        return Learning(-(-self.batch // self.accumulate))

    def rows(self, cases: int, sampling_steps: int) -> float:
        return 3.0 * self.updates * self.batch

    def search(self, pipe: Text2Image, cases: AttackCases, means: Means) -> Inversion:
        """Learn the new word on ``pipe``; see `Attack.search`. Nobody is asked on the way whether it has succeeded.

        Raises:
            BadInput: neither pictures nor an original pipeline; more tokens than the context holds; an init
                word that is not one token; ``captions`` without prompts that name the concept.
        """
        concept, word = cases.concept, new_word(pipe)
        init_word = self.init_word or neutral_word(pipe)
        pictures, captions = cases.pictures, cases.captions
        if pictures is None:
            pictures, captions = self._draw(means.original, concept)
        texts = self._texts(word if self.tokens else concept, concept, captions, len(pictures))
        token = pipe.add_token(word, init_word, self.tokens) if self.tokens else None
        losses: list[float] = []
        if token is not None:
            losses = self._learn(pipe, token, self._latents(pipe, pictures), texts, means)
        return Inversion(concept, self.budget(), word, init_word, token, losses)

    def _draw(self, original: Text2Image | None, concept: str) -> tuple[Tensor, list[str]]:
        if original is None:
            raise BadInput("concept inversion learns from pictures: give a folder of them, or the original model")
        require_memory(12 * original.size**2 * self.n_images, f"{self.n_images:,} pictures to learn from")
        prompts = [self.phrases[i % len(self.phrases)].replace("{}", concept) for i in range(self.n_images)]
        seeds = [2**20 + self.seed * self.n_images + i for i in range(self.n_images)]
        return original.draw(prompts, seeds), prompts

    def _texts(self, said: str, concept: str, prompts: Sequence[str] | None, n: int) -> list[list[str]]:
        """For every picture the texts that may go with it."""
        if not self.captions or prompts is None:
            return [[t.replace("{}", said) for t in self.phrases]] * n
        if len(prompts) != n or any(say(p, concept, "") == p for p in prompts):
            raise BadInput(f"captions=True needs the prompt of every picture, and {concept!r} in each")
        return [[say(p, concept, said)] for p in prompts]

    def _latents(self, pipe: Text2Image, pictures: Tensor) -> Latents:
        """What is learned from: every picture as it is and, where any is mirrored, mirrored too."""
        return latents_of(pipe, pictures, mirrored=self.flip > 0)

    def _learn(
        self,
        pipe: Text2Image,
        token: LearnedToken,
        latents: Latents,
        texts: list[list[str]],
        means: Means,
    ) -> list[float]:
        """Minimise the denoising loss over the token's rows; the loss of every step."""
        config, folder = self.beyond(), means.folder
        if folder is not None:
            folder = folder / "training"
            config |= {"model": pipe.describe()["sha256"], "pictures": tensors_sha256(vars(latents)), "texts": texts}
        with token, frozen(p for a in pipe.adapters.values() for p in a.parameters()):
            run = Run(WordLearning(self, pipe, token, latents, texts), self, folder, config)
            with means.spending.allowed():
                run.fit(means.progress)
        return run.history.get("loss", [])


class WordLearning(Recipe):
    """`ConceptInversion` as the loop sees it.

    What it draws comes from one generator for all steps, whose state is therefore part of the checkpoint.
    """

    name = "concept-inversion"
    title = "learning a word"

    def __init__(
        self, attack: ConceptInversion, pipe: Text2Image, token: LearnedToken, latents: Latents, texts: list[list[str]]
    ):
        self.attack, self.pipe, self.latents, self.texts = attack, pipe, latents, texts
        self.rows = Loose(token.parameters())
        self.rows.register_buffer("random", torch.Generator().manual_seed(attack.seed).get_state())
        self.last: tuple[int, Any] = (-1, None)

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.dtype

    def modules(self) -> dict[str, nn.Module]:
        return {"word": self.rows}

    def loss(self, batch: dict[str, int], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        share = slice(rng.rows.start, rng.rows.stop)  # the loop gives a Share
        z0, t, eps, said = (drawn[share] for drawn in self.drawn(batch["step"]))
        return denoising_loss(self.pipe, z0, t, eps.to(z0), encode_once(self.pipe, said)), {}

    def drawn(self, step: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Latents, times, noise and texts of all rows of a step, for each of its micro-batches."""
        if self.last[0] != step:
            rng, n, T = torch.Generator(), self.attack.batch, self.pipe.clock.timesteps
            mean, std = self.latents.mean, self.latents.std
            rng.set_state(self.rows.random.cpu())
            at = torch.randint(mean.shape[1], (n,), generator=rng)
            t = (torch.randint(T, (n,), generator=rng) + 1) / T
            eps = torch.randn(n, *mean.shape[2:], generator=rng)
            options = [self.texts[i] for i in at.tolist()]
            said = [some[int(torch.randint(len(some), (), generator=rng))] for some in options]
            view = torch.zeros(n, dtype=torch.long)
            if self.attack.flip:
                view = (torch.rand(n, generator=rng) < self.attack.flip).long()
            rows = (view.to(mean.device), at.to(mean.device))
            z0 = mean[rows]
            if self.attack.sample_posterior:
                z0 = z0 + std[rows] * torch.randn(z0.shape, generator=rng).to(std)
            self.last = step, (z0, t, eps, said)
            self.rows.random.copy_(rng.get_state())
        return self.last[1]


@dataclass
class Inversion(Found):
    """A learned word; ``token`` is None where the attack was given no tokens."""

    word: str
    init_word: str
    token: LearnedToken | None
    losses: list[float]

    @property
    def embedding(self) -> Float[Tensor, "tokens width"] | None:
        """The learned rows of the first text encoder."""
        return None if self.token is None else self.token.embedding.detach()

    def draw(
        self, pipe: Text2Image, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
    ) -> Float[Tensor, "n 3 height width"]:
        """See `Found.draw`: the concept's name in the prompts is replaced by the learned word.

        Raises:
            BadInput: a prompt that does not name the concept, or that the new tokens make too long.
        """
        if unnamed := [p for p in prompts if say(p, self.concept, "") == p]:
            raise BadInput(f"the prompt {unnamed[0]!r} does not name {self.concept!r}, which the word replaces")
        if self.token is None:
            return pipe.draw(list(prompts), list(seeds), **settings)
        check_length(pipe, [say(p, self.concept, "{}") for p in prompts], self.token.vectors)
        with on(pipe, self.token, self.init_word):
            return pipe.draw([say(p, self.concept, self.word) for p in prompts], list(seeds), **settings)

    def record(self) -> dict[str, Any]:
        return {"word": self.word, "init_word": self.init_word, "losses": self.losses}

    def write(self, folder: Path) -> None:
        """``learned_embeds.safetensors``, for ``pipe.load_textual_inversion``."""
        if self.token is not None:
            self.token.save(folder / "learned_embeds.safetensors")


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for ``parameters`` inside the block: what is attacked is left as it was, without any of its own."""
    wanted = [p for p in parameters if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


@contextmanager
def on(pipe: Text2Image, token: LearnedToken, init_word: str) -> Iterator[None]:
    """``pipe`` with a word that may have been learned on another pipeline of its kind."""
    with pipe.add_token(token.word, init_word, token.vectors) as here:
        for row, learned in zip(here.embeddings, token.embeddings, strict=True):
            row.data.copy_(learned.detach())
        yield


def new_word(pipe: Text2Image) -> str:
    """A word that no tokenizer of the pipeline knows."""
    known = [tokenizer.get_vocab() for tokenizer in pipe.tokenizers]
    return next(w for w in (f"<v{i}>" for i in count()) if not any(w in vocab for vocab in known))
