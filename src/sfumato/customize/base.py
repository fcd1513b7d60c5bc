"""What a customiser is: a dataclass of settings that learns words and products from a few pictures."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from sfumato.data.cases import say
from sfumato.data.templates import PLAIN, PUBLISHED, Kind
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, Positive, Share
from sfumato.files import tensors_sha256
from sfumato.finite import require_finite
from sfumato.memory import require_memory
from sfumato.pipeline import Text2Image
from sfumato.pipeline.adapter import refuse_adapters
from sfumato.pipeline.customization import Customization, attach
from sfumato.pipeline.lent import lent
from sfumato.pipeline.timing import seconds_per_row
from sfumato.plan import Plan
from sfumato.settings import Tuned
from sfumato.text import counted
from sfumato.train.loop import Run
from sfumato.train.schedule import Tuning
from sfumato.train.words import check_length, latents_of, neutral_word

from .parts.learning import Given, Learning


@dataclass(frozen=True, kw_only=True)
class Customizer(Tuned, Tuning, ABC):
    """Fields and run of every customiser; not a method itself.

    A subclass says in `learned` what it learns, and in `names` the new words.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"updates": 2, "batch": 2, "lr": 0.05, "checkpoint_every": 1}
    """Settings that take about a second on a tiny pipeline, for the tests that all customisers share."""

    updates: Natural = 1000
    batch: Count = 1
    """Pictures (each with its noise, time and text) in an update."""
    lr: Positive = 1e-4
    """Learning rate of AdamW."""
    flip: Share = 0.5
    """How often a picture is mirrored; 0 where left and right matter."""
    sample_posterior: bool = True
    """Draw from the autoencoder's posterior anew each time; else its mean is learned from."""

    rows_per_picture: ClassVar[float] = 3.0
    """What a picture in an update costs in forward passes of the network; a backward pass counts as two."""

    # What a method says

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The new words, as prompts will say them."""

    @abstractmethod
    def texts(self, pipe: Text2Image, prompts: Sequence[str]) -> list[list[str]]:
        """For each picture what may be said of it while learning, by its prompt ("": it has none)."""

    @abstractmethod
    def learned(self, pipe: Text2Image, given: Given, folder: Path | None) -> Customization:
        """What is learned on ``pipe``, which is left exactly as it was; everything on the CPU."""

    def check(self, pipe: Text2Image) -> None:
        """Raise `BadInput` if it cannot be learned on this pipeline."""

    # The run

    def run(
        self,
        pipe: Text2Image | DiffusionPipeline,
        pictures: Float[Tensor, "n 3 height width"],
        prompts: Sequence[str] | None = None,
        folder: Path | None = None,
    ) -> Text2Image:
        """A new pipeline that knows what the pictures show, over the weights of ``pipe``; see `learn`."""
        with lent(pipe) as p:
            return attach(p, [self.learn(p, pictures, prompts, folder)])

    def learn(
        self,
        pipe: Text2Image,
        pictures: Float[Tensor, "n 3 height width"],
        prompts: Sequence[str] | None = None,
        folder: Path | None = None,
    ) -> Customization:
        """Learn from pictures; ``pipe`` is left exactly as it was.

        Args:
            pictures: in [0, 1], of one size.
            prompts: one for each picture, which names what it shows by the new word, by {} or by the word that it
                starts from; "" and None: any of the method's phrases.
            folder: where to keep the state; killed, the same call goes on. None: in memory only.

        Raises:
            BadInput: pictures that show nothing, or whose prompt names nothing of what is to be learned; numbers that
                do not match; a word that the model has already, or too many tokens for its context; adapters are
                attached to ``pipe``.
        """
        refuse_adapters(pipe)
        self.check(pipe)
        prompts = [""] * len(pictures) if prompts is None else list(prompts)
        _check_pictures(pipe, pictures, prompts)
        texts = self.texts(pipe, prompts)
        given = Given(latents_of(pipe, pictures, mirrored=self.flip > 0), texts, pictures)
        return self.learned(pipe, given, folder)

    def fit(self, recipe: Learning, folder: Path | None) -> dict[str, list[float]]:
        """Train in the loop; the losses as `Run.history` has them. What was trained ends up frozen."""
        config = self.beyond()
        if folder is not None:
            latents = {"mean": recipe.given.latents.mean, "std": recipe.given.latents.std}
            config |= {"model": recipe.pipe.describe()["sha256"], "pictures": tensors_sha256(latents)}
            config |= {"texts": [list(some) for some in recipe.given.texts]}
        run = Run(recipe, self, folder and folder / "training", config)
        history = run.fit(self.progress)
        for module in recipe.modules().values():
            module.requires_grad_(False)
        return history

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network."""
        name = type(self).__module__.rpartition(".")[2].replace("_", "-")
        weights = sum(p.numel() * p.element_size() for part in pipe.parts().values() for p in part.parameters())
        row = seconds_per_row(pipe, 1)
        seconds = None if row is None else self.rows_per_picture * self.updates * self.batch * row
        title = f"{name}: {', '.join(self.names)} in {counted(self.updates, 'update')}"
        return Plan(title, memory={"weights": weights}, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class OneWord(Customizer):
    """A customiser of one new word; not a method itself."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **Customizer.EXAMPLE, "init_word": "star", "templates": ("a photo of {}",),
    }  # fmt: skip

    word: str = "<mine>"
    """The new word, as prompts will say it."""
    init_word: str = ""
    """A word of the model for what the pictures show, from which the new one starts; a picture's own prompt may name
    it by this word. Empty: object, shape, art, ..., whatever is the first that is one token of the model."""
    kind: Kind = "object"
    """Which of the published phrases are learned with, for pictures without prompts: 27 of objects, 19 of styles or 2
    of persons."""
    templates: tuple[str, ...] = ()
    """Phrases with {} where the new word stands, instead of those of ``kind``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any("{}" not in t for t in self.templates):
            raise BadInput('every template needs {} where the new word stands, for example "a photo of {}"')

    @property
    def names(self) -> tuple[str, ...]:
        return (self.word,)

    @property
    def subject(self) -> str:
        """What stands in a text for what is learned, with {} for the new word."""
        return "{}"

    @property
    def tokens_needed(self) -> int:
        """Tokens that the new word takes in a text."""
        return 1

    def start(self, pipe: Text2Image) -> str:
        """The word to start from."""
        return self.init_word or neutral_word(pipe)

    def texts(self, pipe: Text2Image, prompts: Sequence[str]) -> list[list[str]]:
        phrases = [t.replace("{}", self.subject) for t in self.templates or PUBLISHED[self.kind]]
        found = [[self.told(prompt)] if prompt else phrases for prompt in prompts]
        check_length(pipe, list(dict.fromkeys(t for some in found for t in some)), self.tokens_needed)
        return found

    def told(self, prompt: str) -> str:
        """A picture's prompt with the `subject`, {} for the new word, where it names what is to be learned.

        Raises:
            BadInput: it names nothing of that.
        """
        text = prompt.replace(self.word, "{}")
        if "{}" in text:
            return before_noun(text, "{}", self.subject.removeprefix("{}").strip())
        if self.init_word and (told := say(prompt, self.init_word, self.subject)) != prompt:
            return told
        named = f"{self.word} or {{}}" + (f" or {self.init_word!r}" if self.init_word else "")
        raise BadInput(
            f"the prompt {prompt!r} names none of what is to be learned ({named}): name it there, or leave the picture "
            "out if it does not show it"
        )


def before_noun(text: str, word: str, noun: str) -> str:
    """A text with ``noun`` behind each ``word``, where it does not stand there already; without a noun as it is."""
    follows = rf"(?!\s+{re.escape(noun)}(?:e?s)?(?!\w))"
    return re.sub(re.escape(word) + follows, lambda _: f"{word} {noun}", text) if noun else text


def check_new_words(words: Sequence[str]) -> None:
    """Refuse new words among which one is given twice, or stands inside another, where texts would find it too.

    Raises:
        BadInput: as said; no words.
    """
    if not words or len(set(words)) < len(words):
        raise BadInput(f"give new words, each once: got {', '.join(words) or 'none'}")
    for word in words:
        if within := [other for other in words if other != word and word in other]:
            raise BadInput(f"the word {word} stands inside of {within[0]}: put them in brackets, as <{word}>")


SKETCH = {"templates": PLAIN, "flip": 0.0, "sample_posterior": False}
"""What suits the embedded model: phrases of its own words, left and right kept apart, latents as it was trained on."""


def _check_pictures(pipe: Text2Image, pictures: Tensor, prompts: Sequence[str]) -> None:
    if len(pictures) != len(prompts):
        raise BadInput(f"give one prompt for each picture: got {len(prompts)} for {len(pictures)}")
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2] != pictures.shape[3] or not len(pictures):
        raise BadInput(f"pictures come as a tensor (n, 3, side, side) in [0, 1], not {tuple(pictures.shape)}")
    pipe.latent_shape(pictures.shape[-1])
    require_memory(24 * pictures.numel(), f"{len(pictures):,} pictures to learn from")
    require_finite([("pictures", pictures)], "what is to be learned")
    if pictures.min() < -1e-3 or pictures.max() > 1 + 1e-3:
        raise BadInput("pictures to learn from have values in [0, 1]: divide those of 8 bits by 255")
    flat = pictures.flatten(2)
    empty = (flat.amax(-1) - flat.amin(-1)).amax(-1) < 1e-6
    if empty.any():  # the one case in which a tensor alone says that nothing is shown
        raise BadInput(f"picture {int(empty.nonzero()[0])} is of one colour and shows nothing: leave it out")
