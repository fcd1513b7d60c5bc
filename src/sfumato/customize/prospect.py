"""ProSpect: one learned embedding for each stage of time, and prompts that take a part of what was learned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput, unknown
from sfumato.fields import Count, Decay, Natural, NotNegative
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.customization import Customization, add_words
from sfumato.pipeline.stages import stage_of
from sfumato.pipeline.tokens import refuse_known, standing_in
from sfumato.train.words import denoising_loss, encode_once

from .base import OneWord
from .parts.learning import Drawn, Given, Learning
from .parts.mapper import Mapper, clipped

Attribute = Literal["all", "layout", "content", "material", "style"]
SHARES: Mapping[Attribute, tuple[float, float]] = {
    "all": (0.0, 1.0), "layout": (0.9, 1.0), "content": (0.0, 0.8), "material": (0.0, 0.5), "style": (0.0, 0.5),
}  # fmt: skip
"""Where on the axis of time (0 = clean) an attribute is drawn; of ten stages: layout 9, content 0-7, material 0-4."""


def carries(stage: int, stages: int, attribute: Attribute) -> bool:
    """Whether the learned word is said in this stage for this attribute.

    Raises:
        BadInput: unknown attribute.
    """
    if attribute not in SHARES:
        raise unknown("attribute", attribute, SHARES)
    low, high = SHARES[attribute]
    if stage == stages - 1:  # layout is drawn first: in the first stage, however much of the axis that is
        return high == 1 or stages == 1
    return low <= (stage + 0.5) / stages <= high


def attribute_prompts(base: str, attribute: Attribute, token: str = "*", stages: int = 10) -> list[str]:
    """A prompt for each stage, stage 0 (which acts last) first: ``base`` with the token, or with the token left out.

    "layout": the token in stage 9 of ten; "content": 0 to 7; "material", "style": 0 to 4; "all": everywhere.
    """
    without = " ".join(base.replace(token, "").split())
    return [base if carries(s, stages, attribute) else without for s in range(stages)]


def stage_texts(entries: Sequence[str | int], words: Sequence[str], base: str = "*") -> list[str]:
    """The text of each stage, from what the paper's interface is given: one entry a stage, stage 0 first.

    A text is put in the place of ``*`` in ``base``; ``*`` inside it is the stage's own learned word. A number j is the
    text of stage j as it stands when the entries are gone through in order: the edited one for j before this stage,
    the learned word alone for j behind it.

    Raises:
        BadInput: not one entry a stage, a number that is no stage.
    """
    if len(entries) != len(words):
        raise BadInput(f"{len(entries)} prompts for {len(words)} stages: give one for each, stage 0 (the last) first")
    texts: list[str] = []
    for s, entry in enumerate(entries):
        if isinstance(entry, int):
            if not 0 <= entry < len(words):
                raise BadInput(f"there is no stage {entry}: stages are 0 to {len(words) - 1}")
            texts.append(texts[entry] if entry < s else base.replace("*", words[entry]))
        else:
            texts.append(" ".join(base.replace("*", entry.replace("*", words[s])).split()))
    return texts


def by_stage(pipe: Text2Image, texts: Sequence[str]) -> Callable[[float], Conditioning]:
    """The ``cond`` of a draw that says ``texts[s]`` in stage s; each is encoded once."""
    encoded, T = {text: pipe.encode(text) for text in dict.fromkeys(texts)}, pipe.clock.timesteps
    return lambda t: encoded[texts[stage_of(t, len(texts), T)]]


@dataclass(frozen=True, kw_only=True)
class ProSpect(OneWord):
    """Learns one embedding of a new word for each of ``stages`` parts of the way from noise to picture.

    Solves the objective of arXiv:2305.16225, the denoising loss with the prompt of stage s(t) = floor(t S / T) at
    timestep t, by a mapper (`Mapper`) from the embedding of ``init_word`` to all S embeddings, with the model frozen.
    With several text encoders (SDXL) each has a mapper of its own. In prompts ``<mine>`` says the stage's own word in
    every stage, and ``<mine:layout>``, ``<mine:content>``, ``<mine:material>`` and ``<mine:style>`` say it only in
    those stages that draw this attribute (layout is drawn first). From pictures, with ``start=Noised(...)``, the
    same rule holds for the steps that are left. Cost: ``updates`` forward and backward passes of network and text
    encoders; one stage is encoded a row.

    Differs from the paper: nothing that is known. As in the published code the caption is the word alone. Unconfirmed:
    the stages of style, for which those of material stand. A word of a stage's prompt is all its tokens (the published
    code takes the first), and dropout is off once the embeddings are learned (there it stays on).
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {**OneWord.EXAMPLE, "lr": 1e-2}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {}, "sketch": {"updates": 300, "batch": 8, "lr": 1e-3, "flip": 0.0, "sample_posterior": False},
    }  # fmt: skip
    """Settings by name: those of the published code (the defaults), and some for models as small as the embedded one,
    not tuned."""

    updates: Natural = 600
    weight_decay: NotNegative = 1e-2
    templates: tuple[str, ...] = ("{}",)
    """Phrases with {} where the new word stands, for pictures without prompts."""
    stages: Count = 10
    """S: parts of the axis of time."""
    dropout: Decay = 0.1
    """Dropout inside the mapper while it learns."""
    max_norm: NotNegative = 0.0
    """Longest embedding, as a multiple of the median norm of the model's own; 0: any, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.word.startswith("<") and self.word.endswith(">")):  # else one word would be found in another
            raise BadInput(f"ProSpect's word has words of its stages beside it: write it in brackets, as <{self.word}>")

    @property
    def stage_words(self) -> list[str]:
        """The words of the stages, stage 0 (which ends a draw) first."""
        return [self._named(f"-{s}") for s in range(self.stages)]

    def learned(self, pipe: Text2Image, given: Given, folder: Path | None) -> Customization:
        words = self.stage_words
        for tokenizer in pipe.tokenizers:
            refuse_known(tokenizer, self.word)
        if self.word in pipe.stages:
            raise BadInput(f"{self.word!r} is already a word of this model: choose a new one")
        starts, longest = self.starts(pipe)
        blank = {word: tuple(e[None].expand(1, -1) for e in starts) for word in words}
        student = add_words(pipe, [Customization(blank)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            mappers = torch.nn.ModuleList([Mapper(e, self.stages, self.dropout) for e in starts]).to(pipe.device)

        def spectra() -> list[Float[Tensor, "stages width"]]:
            return [clipped(m(), self.max_norm * n) for m, n in zip(mappers, longest, strict=True)]

        def loss(drawn: Drawn, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            with standing_in(student, words[0], spectra()):
                cond = encode_once(student, self.said(student, drawn))
            return denoising_loss(student, drawn.z0, drawn.t, drawn.eps, cond), {}

        modules = {"mapper": mappers.train()}
        recipe = Learning("prospect", student, modules, given, loss, self.flip, self.sample_posterior)
        losses = self.fit(recipe, folder)
        mappers.eval()
        with torch.no_grad():
            rows = [x.cpu() for x in spectra()]
        told = {"losses": losses.get("loss", []), "norms": [x.norm(dim=1).tolist() for x in rows]}
        found = {word: tuple(x[s : s + 1].clone() for x in rows) for s, word in enumerate(words)}
        return Customization(found, stages=self.said_in_stages(), about=told)

    def said(self, pipe: Text2Image, drawn: Drawn) -> list[str]:
        """Each row's text with the word of its stage."""
        stage = [stage_of(t, self.stages, pipe.clock.timesteps) for t in drawn.t.tolist()]
        return [text.replace("{}", self.stage_words[s]) for text, s in zip(drawn.said, stage, strict=True)]

    def said_in_stages(self) -> dict[str, list[str]]:
        """What ``<mine>`` and its attributes stand for in each stage; "": it is left out."""
        words = self.stage_words
        at = lambda a: [word if carries(s, self.stages, a) else "" for s, word in enumerate(words)]
        return {self.word: words} | {self._named(f":{a}"): at(a) for a in SHARES if a != "all"}

    def starts(self, pipe: Text2Image) -> tuple[list[Float[Tensor, "width"]], list[float]]:
        """e_0 of each text encoder, and the median norm of its words.

        Warns:
            UserWarning: the initialiser is several tokens, of which the first alone counts, as in the published code.
        """
        word, rows, norms = self.start(pipe), [], []
        for tokenizer, table in zip(pipe.tokenizers, pipe.word_tables, strict=True):
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if not ids:
                raise BadInput("the word to start from is empty: name one that the model knows")
            if len(ids) > 1:
                warnings.warn(f"{word!r} is {len(ids)} tokens: ProSpect starts from the first alone", stacklevel=4)
            weight = table.float()
            rows.append(weight[ids[0]].clone())
            norms.append(float(weight.norm(dim=1).median()))
        return rows, norms

    def _named(self, suffix: str) -> str:
        return f"{self.word[:-1]}{suffix}>"
