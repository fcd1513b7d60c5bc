"""Anchored composition: several subjects learned together, and drawn together from the latent of an anchor picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data.cases import say
from sfumato.errors import BadInput, unknown
from sfumato.fields import Count, Natural, NotNegative, Positive, Share
from sfumato.noise.process import compose as combined
from sfumato.pipeline import Text2Image
from sfumato.pipeline.customization import Customization, add_words
from sfumato.train.draw import integers, normal
from sfumato.train.words import Latents, check_length, denoising_loss

from .base import SKETCH, Customizer, before_noun, check_new_words
from .dreambooth_lora import CLASS, DreamBoothLoRA
from .parts.anchor import compose, verify
from .parts.learning import Drawn, Given, Learning, of_posterior
from .parts.products import factors, on_attention, products_of

__all__ = ["ORIGINS", "AnchoredComposition", "compose", "even_weights", "joint_loss", "verify"]

ORIGINS = ("synthetic", "licensed", "consented")
"""Where a subject may come from."""


def even_weights(groups: Sequence[Sequence[int]]) -> Float[Tensor, "n"]:
    """Weights of pictures, 1 in the mean, under which every group of subjects counts alike however many show it."""
    kinds = [tuple(g) for g in groups]
    distinct = set(kinds)
    return torch.tensor([len(kinds) / (len(distinct) * kinds.count(k)) for k in kinds])


def joint_loss(
    pred: Float[Tensor, "batch *dims"], target: Float[Tensor, "batch *dims"], weights: Float[Tensor, "batch"]
) -> Float[Tensor, ""]:
    """Mean over rows of w ||pred - target||^2, the norm as a mean over a row's elements."""
    return ((pred - target).square().flatten(1).mean(dim=1) * weights).mean()


@dataclass(frozen=True, kw_only=True)
class AnchoredComposition(Customizer):
    """Teaches several subjects at once, each by a word before its class noun; every picture drawn of them is marked.

    After arXiv:2309.14751, for synthetic, licensed and consented subjects only. Low-rank products on attention are
    trained jointly with "a photo of <mine> CLASS" for each subject, every one counting alike, plus ``prior_weight``
    times the loss of pictures that the untouched model draws of each class. `compose` then starts from the latent of
    an anchor picture, which gives layout, poses and numbers, while the words give looks. Cost: ``updates`` forward and
    backward passes of the network on twice the batch; ``n_prior`` pictures of each class are drawn first.

    Provenance is no setting: whatever pipeline knows a subject marks all that it draws in the pixels
    (`sfumato.pipeline.watermark`), reads the mark back, and returns nothing where that fails; so does one that it was
    saved to or copied to. It gives no latents and no gradients. `compose` (``sfumato compose``) adds metadata and a
    sidecar, read back as well; `verify` (``sfumato verify PICTURE``) reads mark and metadata. No mark outlives a
    determined remover, most platforms strip metadata, and a file of weights loaded by other tools draws without marks.

    Unconfirmed, for the paper has no code: its model, its settings and at which noise the anchor's latent enters (see
    `compose`); settings are diffusers' conventions. Differs from the paper: products in place of the whole network;
    identifiers are new words with a fixed random embedding; one mark of this package's own for all sizes. Not here:
    pasted pairs of subjects as pictures to learn from, regions of a subject's attention, C2PA manifests.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **Customizer.EXAMPLE, "words": ("<mine>",), "classes": ("star",), "origins": ("synthetic",),
        "statements": ("rendered for a test",), "rank": 2, "n_prior": 1, "prior_steps": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "diffusers": {},
        "sketch": {
            "updates": 300, "lr": 2e-3, "batch": 4, "n_prior": 16, "prior_steps": 20,
            **{key: x for key, x in SKETCH.items() if key != "templates"},
        },
    }  # fmt: skip
    """Settings by name: diffusers' conventions (the defaults), and some for models as small as the embedded one, not
    tuned."""
    rows_per_picture: ClassVar[float] = 6.0

    updates: Natural = 800
    """Updates, of all subjects together: 400 for each of two."""
    lr: Positive = 1e-4
    weight_decay: NotNegative = 1e-2
    clip_norm: NotNegative = 1.0
    flip: Share = 0.0
    words: tuple[str, ...] = ("<mine1>", "<mine2>")
    """The new words, as prompts will say them; each before its class noun."""
    classes: tuple[str, ...] = ()
    """The class noun of each subject, each another: subjects of one noun mix."""
    origins: tuple[str, ...] = ()
    """Where each subject comes from: synthetic, licensed or consented. Real persons only with consent on record."""
    statements: tuple[str, ...] = ()
    """For each subject a sentence that says so: who made it, under which licence, whose consent is recorded where."""
    rank: Count = 16
    """Rank of each product."""
    n_prior: Natural = 200
    """Pictures of each class that the pipeline draws, to be kept; 0: none."""
    prior_weight: NotNegative = 1.0
    """lambda: weight of the classes' denoising loss."""
    prior_steps: Natural = 0
    """Steps in which they are drawn; 0: the model's own number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_new_words(self.words)
        for origin in self.origins:
            if origin not in ORIGINS:
                raise unknown("origin", origin, ORIGINS)
        for name in ("classes", "origins", "statements"):
            found = getattr(self, name)
            if found and len(found) != len(self.words):
                raise BadInput(f"{name} has {len(found)} for {len(self.words)} subjects: give one for each")
            if not all(x.strip() for x in found):
                raise BadInput(f"one of {name} is empty: give one for each subject")
        if len(set(self.classes)) < len(self.classes):
            raise BadInput("two subjects have one class noun, which mixes them: give each a noun of its own")

    @property
    def names(self) -> tuple[str, ...]:
        return self.words

    def check(self, pipe: Text2Image) -> None:
        """Refuse subjects whose class, or whose origin, nobody has said.

        Raises:
            BadInput: as said.
        """
        if not self.origins or not self.statements:
            raise BadInput(
                "declare where each subject comes from: --origins (synthetic, licensed or consented), and --statements "
                "with a sentence for each"
            )
        if not self.classes:
            raise BadInput("name the class of each subject, as in --classes dog cup")

    def texts(self, pipe: Text2Image, prompts: Sequence[str]) -> list[list[str]]:
        """For each picture its prompt, with the words before their class nouns."""
        said = [self.told(prompt) for prompt in prompts]
        missing = set(range(len(self.words))).difference(*(which for _, which in said))
        if missing:
            names = ", ".join(self.words[k] for k in sorted(missing))
            raise BadInput(f"no picture's prompt names {names}: write beside each picture (NAME.txt) whom it shows")
        for text, which in said:
            bare = text
            for word in self.words:
                bare = bare.replace(word, " ")
            check_length(pipe, [bare], len(which))
        return [[text] for text, _ in said]

    def told(self, prompt: str) -> tuple[str, list[int]]:
        """A picture's prompt with the words before their class nouns, and which subjects it shows.

        Raises:
            BadInput: it names none of them, or there is none and several subjects to choose from.
        """
        if not prompt and len(self.words) == 1:
            return CLASS.format(f"{self.words[0]} {self.classes[0]}"), [0]
        text = prompt.replace("{}", self.words[0]) if len(self.words) == 1 else prompt
        which = [k for k, word in enumerate(self.words) if word in text]
        for k in which:
            text = before_noun(text, self.words[k], self.classes[k])
        if not which:  # none by its word: by their nouns
            named = {k: say(prompt, noun, f"{self.words[k]} {noun}") for k, noun in enumerate(self.classes)}
            which = [k for k in named if named[k] != prompt]
            for k in which:
                text = say(text, self.classes[k], f"{self.words[k]} {self.classes[k]}")
        if which:
            return text, which
        names = ", ".join((*self.words, *self.classes))
        raise BadInput(f"the prompt {prompt!r} names none of the subjects ({names}): say whom the picture shows")

    def learned(self, pipe: Text2Image, given: Given, folder: Path | None) -> Customization:
        words = {word: each.identifier(pipe) for word, each in self.singles.items()}
        student = add_words(pipe, [Customization(words)])
        adapter = on_attention(student, self.rank, self.seed)
        texts = list(dict.fromkeys(text for some in given.texts for text in some))
        said = student.encode(texts)
        groups = [[k for k, word in enumerate(self.words) if word in some[0]] for some in given.texts]
        weights = even_weights(groups).to(student.device)
        kept, of_class = None, None
        if self.n_prior and self.prior_weight:
            each = [single.prior(pipe) for single in self.singles.values()]
            kept = Latents(torch.cat([x.mean for x in each]), torch.cat([x.std for x in each]))  # a class is a view
            of_class = student.encode([CLASS.format(noun) for noun in self.classes])

        def loss(drawn: Drawn, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            process, kind = student.denoiser.process, student.denoiser.prediction
            alpha, sigma = process.alpha_sigma(drawn.t, drawn.z0)
            target = combined(drawn.z0, drawn.eps, alpha, sigma, kind)
            cond = said[[texts.index(text) for text in drawn.said]]
            pred = student.denoiser(alpha * drawn.z0 + sigma * drawn.eps, drawn.t, cond)
            own = joint_loss(pred, target, weights[drawn.at.to(weights.device)])
            if kept is None or of_class is None:
                return own, {}
            n, T = len(drawn.z0), student.clock.timesteps
            which, row = integers(len(kept.mean), n, rng), integers(self.n_prior, n, rng)
            rows = (which.to(kept.mean.device), row.to(kept.mean.device))
            z0 = of_posterior(kept, rows, rng if self.sample_posterior else None)
            t = ((integers(T, n, rng) + 1) / T).to(z0)
            prior = denoising_loss(student, z0, t, normal(z0.shape, rng).to(z0), of_class[which.tolist()])
            return own + self.prior_weight * prior, {"own": own, "prior": prior}

        modules = {"lora": factors(adapter)}
        recipe = Learning("anchored-composition", student, modules, given, loss, self.flip, self.sample_posterior)
        losses = self.fit(recipe, folder)
        about = {"losses": losses.get("loss", []), "subjects": self.subjects}
        return Customization(words, products_of(adapter), about=about, marked=self.subjects)

    @cached_property
    def singles(self) -> dict[str, DreamBoothLoRA]:
        """For each subject what would learn it alone: who chooses its identifier and draws its class."""
        prior: dict[str, Any] = {"n_prior": self.n_prior, "prior_steps": self.prior_steps, "progress": self.progress}
        seeds = [self.seed * len(self.words) + k for k in range(len(self.words))]
        each = zip(self.words, self.classes, seeds, strict=True)
        return {word: DreamBoothLoRA(word=word, init_word=noun, seed=seed, **prior) for word, noun, seed in each}

    @property
    def subjects(self) -> dict[str, dict[str, str]]:
        """What is declared of each subject."""
        told = zip(self.words, self.classes, self.origins, self.statements, strict=True)
        return {w: {"class": c, "origin": o, "statement": s} for w, c, o, s in told}
