"""DreamBooth with low-rank products: a rare identifier before the class noun, and the class kept (arXiv:2208.12242)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive, Share
from sfumato.memory import require_memory
from sfumato.pipeline import Text2Image
from sfumato.pipeline.customization import Customization, add_words
from sfumato.train.draw import integers, normal
from sfumato.train.words import Latents, denoising_loss, latents_of

from .base import SKETCH, OneWord
from .parts.learning import Drawn, Given, Learning, of_posterior
from .parts.products import factors, on_attention, products_of

CLASS = "a photo of {}"


@dataclass(frozen=True, kw_only=True)
class DreamBoothLoRA(OneWord):
    """Trains low-rank products on the attention projections with "a photo of <mine> CLASS", and keeps the class.

    Minimises eq. 2 of arXiv:2208.12242, the denoising loss of the pictures plus ``prior_weight`` times that of pictures
    of the class ("a photo of CLASS", drawn by the pipeline itself before it learns), each a mean over all elements in
    the network's native prediction. What is trained are products of rank ``rank`` on every query, key, value and
    output projection of attention, as diffusers' script does (arXiv:2106.09685). ``init_word`` is the class noun; say
    ``<mine> CLASS`` to draw. Cost: ``updates`` forward and backward passes of the network on twice the batch;
    ``n_prior`` pictures are drawn first.

    Differs from the paper: products in place of the whole network (and the text encoder, frozen here); the identifier
    is a new word in place of a rare one, with a fixed random embedding as long as words' are, which means nothing to
    the model, as a rare word hardly does.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {**OneWord.EXAMPLE, "rank": 2, "n_prior": 1, "prior_steps": 2}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "diffusers": {}, "sketch": {"updates": 150, "lr": 2e-3, "batch": 4, "n_prior": 16, "prior_steps": 20, **SKETCH},
    }  # fmt: skip
    """Settings by name: those of diffusers' script (the defaults; batch and updates as in its README's command, for the
    script's own are 4 and an epoch), and some for models as small as the embedded one."""
    rows_per_picture: ClassVar[float] = 6.0

    updates: Natural = 500
    lr: Positive = 5e-4
    weight_decay: NotNegative = 1e-2
    clip_norm: NotNegative = 1.0
    flip: Share = 0.0
    templates: tuple[str, ...] = ("a photo of {}",)
    """Phrases with {} where identifier and class noun stand."""
    rank: Count = 4
    """Rank of each product."""
    n_prior: Natural = 100
    """Pictures of the class that the pipeline draws, to be kept; 0: none."""
    prior_weight: NotNegative = 1.0
    """lambda: weight of the class's denoising loss."""
    prior_steps: Natural = 0
    """Steps in which they are drawn; 0: the model's own number."""

    def check(self, pipe: Text2Image) -> None:
        if self.n_prior and self.prior_weight and not self.init_word:
            raise BadInput("name the class of what the pictures show, as in --init-word dog, or keep none: --n-prior 0")

    @property
    def subject(self) -> str:
        return f"{{}} {self.init_word}".strip()

    def learned(self, pipe: Text2Image, given: Given, folder: Path | None) -> Customization:
        word = Customization({self.word: self.identifier(pipe)})
        student = add_words(pipe, [word])
        adapter = on_attention(student, self.rank, self.seed)
        texts = list(dict.fromkeys(text for some in given.texts for text in some))
        said = student.encode([text.replace("{}", self.word) for text in texts])
        kept = self.prior(pipe) if self.n_prior and self.prior_weight else None
        of_class = student.encode(CLASS.format(self.init_word)) if kept is not None else None

        def loss(drawn: Drawn, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            cond = said[[texts.index(text) for text in drawn.said]]
            own = denoising_loss(student, drawn.z0, drawn.t, drawn.eps, cond)
            if kept is None or of_class is None:
                return own, {}
            n, T = len(drawn.z0), student.clock.timesteps
            row = integers(self.n_prior, n, rng).to(kept.mean.device)
            z0 = of_posterior(kept, (0, row), rng if self.sample_posterior else None)
            t = ((integers(T, n, rng) + 1) / T).to(z0)
            prior = denoising_loss(student, z0, t, normal(z0.shape, rng).to(z0), of_class.repeat(n))
            return own + self.prior_weight * prior, {"own": own, "prior": prior}

        modules = {"lora": factors(adapter)}
        recipe = Learning("dreambooth-lora", student, modules, given, loss, self.flip, self.sample_posterior)
        losses = self.fit(recipe, folder)
        return Customization(word.words, products_of(adapter), about={"losses": losses.get("loss", [])})

    def identifier(self, pipe: Text2Image) -> tuple[Float[Tensor, "1 width"], ...]:
        """An embedding for each text encoder, random in direction and as long as its words' are in the median."""
        rng, rows = torch.Generator().manual_seed(self.seed), []
        for weight in pipe.word_tables:
            row = torch.randn(1, weight.shape[1], generator=rng)
            rows.append(row / row.norm() * float(weight.float().norm(dim=1).median()))
        return tuple(rows)

    def prior(self, pipe: Text2Image) -> Latents:
        """Of pictures of the class as the pipeline draws them before it learns."""
        require_memory(12 * pipe.size**2 * self.n_prior, f"{self.n_prior:,} pictures of the class")
        seeds = [2**20 + self.seed * self.n_prior + i for i in range(self.n_prior)]
        said, steps = [CLASS.format(self.init_word)] * self.n_prior, self.prior_steps or None
        drawn = pipe.draw(said, seeds, sampling_steps=steps, progress=self.progress)
        return latents_of(pipe, drawn, mirrored=False)
