"""AttenCraft: several new words out of one picture, told apart by masks from the model's own attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data.cases import say
from sfumato.errors import BadInput
from sfumato.fields import Natural, NotNegative, Share
from sfumato.pipeline import Text2Image
from sfumato.pipeline.customization import Customization
from sfumato.pipeline.lora import Product
from sfumato.pipeline.tokens import LearnedToken
from sfumato.train.recipe import Loose
from sfumato.train.words import check_length

from .base import Customizer, check_new_words
from .parts.crafting import Course
from .parts.learning import Given, Learning
from .parts.maps import Upsampling


@dataclass(frozen=True, kw_only=True)
class AttenCraft(Customizer):
    """Learns the embeddings of several words, and the keys and values of cross-attention, from one picture of them all.

    arXiv:2405.17965. One pass at an early time gives each word a mask: its cross-attention, squared, is spread by the
    fourth power of self-attention, and a cell belongs to the word that leads all others and the background (the start
    token) by ``threshold``. Then one word, or all, are asked for in turn: the denoising loss counts inside their masks
    only, and `attention_loss` pulls their attention onto them; pictures of something else keep the model. Every
    ``refresh`` updates masks are found anew, and taken where SSIM to the last is at least ``ssim`` for every word.
    Several pictures have masks of their own; a picture whose prompt names some of the words shows those. Cost:
    ``updates`` forward and backward passes on twice the batch, attention computed in the open where it is looked at.

    Reconstructed: ``version="second"``, of which the abstract alone is known: masks of the first pass only, and
    `sampling_ratios` estimated from attention. More than two words, which the released code does not take.

    Differs from the paper: masks that collide are looked for again at other times before a picture is refused; weight
    decay reaches the new rows only, not all words; all new words are learned, as the paper has it (by a slip of its
    index the released code zeroes the gradient of the last one); resolutions of attention follow the network's (a
    quarter and half of the latent's side, which are the paper's 16 and 32); masks are first refreshed after ``refresh``
    updates (in the released code in the first one too, right after they were made). Change of keys and values is
    written as products of full rank, which diffusers loads as a LoRA.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **Customizer.EXAMPLE, "lr": 0.01, "init_words": ("star", "circle"), "n_prior": 1, "prior_steps": 2,
        "prior_prompt": "a photo", "threshold": 0.0, "refresh": 1, "phrase": "{}", "joined": " ",
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {}, "second": {"version": "second"},
        "sketch": {
            "updates": 200, "lr": 1e-3, "n_prior": 16, "prior_steps": 20, "prior_prompt": "a red fish",
            "phrase": "a {}", "joined": " and a ", "sample_posterior": False,
        },
    }  # fmt: skip
    """Settings by name: those of the released code (the defaults), the second version of the paper, and some for models
    as small as the embedded one, not tuned. Its attention has 4 by 4 cells there: many a picture is refused by the
    paper's tau, and without one it is taken with masks that may lie on the wrong object."""
    rows_per_picture: ClassVar[float] = 6.0

    updates: Natural = 500
    weight_decay: NotNegative = 1e-2
    clip_norm: NotNegative = 1.0
    flip: Share = 0.0
    words: tuple[str, ...] = ("<new1>", "<new2>")
    """The new words, as prompts will say them."""
    init_words: tuple[str, ...] = ()
    """For each of them a word of the model to start from; a picture's own prompt may name it by this word."""
    described: tuple[str, ...] = ()
    """For each of them how it is said, with {} for the word, as in "{} cat": in masks the strongest of these tokens
    counts. Empty: the word alone."""
    phrase: str = "a photo of {}"
    """The prompt, with {} where the words stand."""
    joined: str = " and "
    """What stands between two words."""
    version: Literal["released", "second"] = "released"
    """Uniform sampling and masks found anew, or ratios estimated from attention and the first masks (reconstructed)."""
    threshold: NotNegative = 0.1
    """tau: by how much a word's map leads all others where a cell is its own."""
    latest: Share = 0.3
    """Times, as a share of all timesteps, below which the first masks are looked for."""
    refresh: Natural = 20
    """Updates after which all words are asked for and, in the released version, masks are found anew; 0: never."""
    ssim: float = 0.8
    """Least structural similarity of a new mask to the last."""
    masked: bool = True
    """Count the denoising loss inside the masks only."""
    upsampling: Upsampling = "bicubic"
    """How masks grow to the latent's size: bicubic (the released code), which overshoots 0 and 1, bilinear or
    nearest."""
    attention_weight: NotNegative = 1.0
    """Weight of the attention loss."""
    per: Literal["cells", "mean"] = "cells"
    """Denoising loss as a sum over channels, which weighs it four to one against the prior (the released code), or as a
    mean."""
    n_prior: Natural = 200
    """Pictures of something else that the pipeline draws, to be kept; 0: none."""
    prior_prompt: str = "a photo at the beach"
    """What they show."""
    prior_weight: NotNegative = 1.0
    """Weight of their denoising loss."""
    prior_steps: Natural = 0
    """Steps in which they are drawn; 0: the model's own number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_new_words(self.words)
        for name in ("init_words", "described"):
            given = getattr(self, name)
            if given and len(given) != len(self.words):
                raise BadInput(f"{name} has {len(given)} for {len(self.words)} words: give one for each")
        if "{}" not in self.phrase or any("{}" not in x for x in self.described):
            raise BadInput("phrase and each of described need {} where the words stand")

    @property
    def names(self) -> tuple[str, ...]:
        return self.words

    def check(self, pipe: Text2Image) -> None:
        if not self.init_words:
            raise BadInput(
                "say what each new word starts from, as in --init-words cat dog: its attention gives the masks"
            )
        kinds = {site.kind for site in pipe.anatomy.sites()}
        if not {"cross", "self"} <= kinds or pipe.tokenizers[0].bos_token_id is None:
            raise BadInput(
                f"AttenCraft needs cross-attention to a text with a start token, which {type(pipe).title} lacks: "
                "take a model of Stable Diffusion 1.x, 2.x or XL, or another method"
            )

    def texts(self, pipe: Text2Image, prompts: Sequence[str]) -> list[list[str]]:
        """For each picture the prompt of all words that it shows; the new words stand in it already."""
        held = [self.held(prompt) for prompt in prompts]
        for which in held:
            text = self.says(which)
            for word in self.words:
                text = text.replace(word, " ")
            check_length(pipe, [text], len(which))
        return [[self.says(which)] for which in held]

    def held(self, prompt: str) -> list[int]:
        """Which words a picture of that prompt shows; all, where it has none.

        Raises:
            BadInput: it names none of them.
        """
        inits = self.init_words or self.words
        named = lambda k: self.words[k] in prompt or say(prompt, inits[k], "") != prompt
        found = [k for k in range(len(self.words)) if not prompt or named(k)]
        if not found:
            raise BadInput(
                f"the prompt {prompt!r} names none of what is to be learned ({', '.join((*self.words, *inits))}): name "
                "it there, or leave the picture out if it does not show it"
            )
        return found

    def says(self, which: Sequence[int]) -> str:
        """The prompt of some of the words."""
        how = self.described or ("{}",) * len(self.words)
        return self.phrase.replace("{}", self.joined.join(how[k].replace("{}", self.words[k]) for k in which))

    def learned(self, pipe: Text2Image, given: Given, folder: Path | None) -> Customization:
        projections = pipe.projections("cross.k", "cross.v")
        student = pipe.copy(own=[f"{p.name}.weight" for p in projections])
        tokens = [student.add_token(w, init) for w, init in zip(self.words, self.init_words, strict=True)]
        trained = {p.name: p.weight for p in student.projections("cross.k", "cross.v")}
        with ExitStack() as active:
            for token in tokens:
                active.enter_context(token)
            run = Course(self, pipe, student, given)
            rows = {f"{t.word}.{i}": e for t in tokens for i, e in enumerate(t.embeddings)}
            modules = {"kv": Loose(trained), "words": Loose(rows), "masks": run.kept}
            recipe = Learning(
                "attencraft", student, modules, given, run.loss, self.flip, self.sample_posterior, partial=True
            )
            losses = self.fit(recipe, folder)
        products = {p.name: _product(trained[p.name].detach() - p.weight.detach()) for p in projections}
        told = {
            "losses": losses.get("loss", []), "sampling ratios": [x.tolist() for x in run.ratios],
            "share of cells by word and background": run.kept.masks.mean(dim=(-2, -1)).tolist(),
            "masks found at": list(run.times), "masks found anew": int(run.kept.renewed),
        }  # fmt: skip
        return Customization({t.word: _rows(t) for t in tokens}, products, about=told)


def _product(change: Float[Tensor, "out in"]) -> Product:
    """A change of weights as a product of full rank, one factor of which is the identity."""
    change = change.cpu().float()
    out, into = change.shape
    if out <= into:
        return Product(change, torch.eye(out), float(out))
    return Product(torch.eye(into), change, float(into))


def _rows(token: LearnedToken) -> tuple[Tensor, ...]:
    return tuple(e.detach().cpu() for e in token.embeddings)
