"""Discrete diffusion: tokens that are masked or changed at random, and a transformer that tells what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import ModelMixin, VQModel
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.data.characters import Characters
from sfumato.data.pictures import Pictures, open_pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, Positive, at_least, within
from sfumato.nets import TokenTransformer
from sfumato.noise import Absorbing, GaussianTokens, UniformTokens
from sfumato.pipeline import Labels, TokenModel

from . import draw
from .codebook import CodebookRecipe, codebook, encode_codes
from .loop import Run
from .pixels import PixelRecipe, PixelTraining
from .schedule import Schedule
from .state import configuration, goes_on, rows_of

LEVELS = 256


@dataclass(frozen=True, kw_only=True)
class Discrete(PixelRecipe):
    """Diffusion of tokens: codes of pictures, characters of a text, or the 256 levels of grey of pixels.

    Continuous time, arXiv:2205.14987 (tau-LDR), with the chains of `sfumato.noise.discrete`. The network tells p(x0 |
    x_t) of every token, and learns it by cross-entropy, whose minimum is the true posterior: with ``chain``
    "absorbing" of masked tokens, weighted by 1 / t, which is the bound of the likelihood (arXiv:2406.07524, eq. 8);
    with "uniform" and "gaussian" of all tokens alike, tau-LDR's auxiliary loss. The rates of jumps that samplers need
    follow from it. The model draws by ``model.tokens``, ``model.draw`` or ``model.write``, in equal steps or in those
    that `sfumato sample jys` chooses (``model.search``). Codes are those of an autoencoder that is trained first;
    in the first half of its updates, codes that are not in use are set to latents of pictures.

    Differs from the paper: for chains without a mask its bound is not added to the cross-entropy. Networks are small
    transformers of this library; presets are untuned.
    Cost: one network call with gradients an update, quadratic in the number of tokens.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **{k: v for k, v in PixelRecipe.EXAMPLE.items() if k != "grid_every"}, "data": "digits", "size": 4,
        "width": 16, "depth": 1, "head_dim": 8, "embedding": 16, "sampling_steps": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small-digits": {"data": "digits", "size": 8, "chain": "gaussian", "updates": 5000, "warmup": 200},
        "small-codes": {"tokens": "codes", "size": 64, "updates": 10_000, "warmup": 200, "pictures": 8000},
        "small-text": {"tokens": "characters", "size": 64, "data": "text.txt", "updates": 10_000, "warmup": 200},
        "countdown": {"width": 128, "depth": 4, "head_dim": 32, "updates": 1024, "batch": 2048, "lr": 1e-3},
    }
    """``small-*``: for a CPU, untuned; "countdown": the network and length of training of arXiv:2410.07761."""

    data: str = "sketch"
    """"sketch", "digits", a folder of pictures, Parquet files, WebDataset shards, hub:OWNER/NAME; or a text file."""
    tokens: Literal["levels", "codes", "characters"] = "levels"
    """What a token is: a level of grey of a pixel, an entry of a codebook that is trained first, or a character."""
    chain: Literal["absorbing", "uniform", "gaussian"] = "absorbing"
    """How tokens are destroyed: masked, replaced by any other, or moved to a near one (levels only)."""
    size: Count = 32
    """Side of the pictures in pixels, or characters of a window of text."""
    flip: bool = field(default=False, init=False)
    """Text has no mirror image."""
    grid_every: Natural = field(default=0, init=False)
    """No pictures are drawn on the way."""
    eps: Annotated[float, within(1e-9, 0.5)] = 1e-3
    """What is never masked, of all tokens."""
    rate: Positive | None = None
    """c of the "uniform" chain; by default 8 over the number of values."""
    least_time: Annotated[float, within(1e-5, 1.0)] = 1e-3
    """No time below this is drawn."""
    width: Count = 128
    """Channels of the transformer."""
    depth: Natural = 4
    """Its blocks."""
    head_dim: Count = 32
    """Channels of an attention head."""
    embedding: Count = 128
    """Width of the embedding of time and class."""
    dropout: Decay = 0.0
    """Dropout in the blocks."""
    codes: Annotated[int, at_least(2)] = 256
    """Entries of the codebook."""
    code_channels: tuple[Count, ...] = (32, 64, 64, 128)
    """Channels of the autoencoder with the codebook, each level but the last halving the side."""
    code_updates: Natural = 3000
    """Updates of that autoencoder."""
    code_batch: Count = 16
    """Pictures in them."""
    code_lr: Positive = 1e-3
    """Their learning rate."""
    sampling_steps: Count = 32
    """Steps that the finished model draws in, unless told otherwise."""
    sampler: Literal["euler", "tau_leaping", "k_gillespie"] = "euler"
    """Its sampler: at most one jump a token and step, Poisson jumps of levels, or a number of masks at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chain == "gaussian" and self.tokens != "levels":
            raise BadInput("the gaussian chain is for values in an order: take it with levels, or another chain")
        if self.sampler == "k_gillespie" and self.chain != "absorbing":
            raise BadInput("k_gillespie needs the absorbing chain")
        if self.sampler == "tau_leaping" and (self.chain == "absorbing" or self.tokens != "levels"):
            raise BadInput("tau_leaping adds jumps up, so it needs levels and a chain without a mask")
        if self.tokens == "codes" and self.size % self._factor:
            raise BadInput(f"size must be a multiple of {self._factor} for these code_channels, got {self.size}")
        if self.sampler == "k_gillespie" and self.sampling_steps > (most := prod(self.shape)):
            raise BadInput(f"{self.sampling_steps} steps are more than the {most} tokens: give at most as many")

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.code_channels) - 1)

    @cached_property
    def _text(self) -> Characters:
        return Characters(self.data, self.size)

    @property
    def values(self) -> int:
        """How many values a clean token may have."""
        return {"levels": LEVELS, "codes": self.codes}.get(self.tokens) or len(self._text.symbols)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tokens of a sample."""
        side = self.size // self._factor if self.tokens == "codes" else self.size
        return (self.size,) if self.tokens == "characters" else (side, side)

    def open(self) -> Any:
        if self.tokens == "characters":
            return self._text
        return open_pictures(self.data, self.size, seed=self.seed, count=self.pictures)

    def process(self) -> Any:  # a TokenProcess, where other recipes have a Gaussian one
        if self.chain == "absorbing":
            return Absorbing(self.values + 1, self.eps)
        if self.chain == "uniform":
            return UniformTokens(self.values, self.rate)
        return GaussianTokens(self.values)

    def network(self, classes: int) -> ModelMixin:
        states = self.values + (self.chain == "absorbing")
        return TokenTransformer(
            states, self.values, prod(self.shape), classes, self.width, self.depth, self.head_dim, self.embedding,
            self.dropout,
        )  # fmt: skip

    def sampling(self) -> dict[str, Any]:
        symbols = self._text.symbols if self.tokens == "characters" else ""
        return {"scheduler": self.sampler, "sampling_steps": self.sampling_steps, "symbols": symbols}

    def model(self, labels: tuple[str, ...], vae: VQModel | None = None) -> TokenModel:
        if self.tokens == "codes":
            vae = vae or codebook(self.size, self.code_channels, self.codes)
        posterior: Any = "posterior"
        return TokenModel(
            self.network(len(labels)), self.process(), posterior, self.shape, labels, self.sampling(), vae
        )

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        pictures = self.open()
        rows = rows_of(self.data, pictures)
        own = {**self.beyond(), **rows}
        goes_on(out / "training", configuration(self.name(), self, own))
        torch.manual_seed(self.seed)
        vae, codes = None, None
        if self.tokens == "codes":
            vae = codebook(self.size, self.code_channels, self.codes)
            keys = {name: getattr(self, name) for name in ("data", "pictures", "size", "codes", "code_channels")} | rows
            first = self._first()
            Run(CodebookRecipe(vae, pictures, first), first, out / "codebook", keys).fit(progress)
            codes = encode_codes(vae.requires_grad_(False).eval(), pictures)
        # Whether the first stage was done just now or before a kill must not matter.
        torch.manual_seed(self.seed + 1)
        model = self.model(self.labels_of(pictures), vae)
        run = Run(TokenTraining(self, model, pictures, codes), self, out / "training", own)
        run.fit(progress)
        model.network.requires_grad_(False).eval()
        run.finish(lambda: model.save(out / "model", overwrite=overwrite, provenance=self.made()))

    def _first(self) -> Schedule:
        shared = {name: getattr(self, name) for name in ("precision", "seed", "checkpoint_every", "compile", "track")}
        return Schedule(updates=self.code_updates, batch=self.code_batch, lr=self.code_lr, ema=0.995, **shared)


class TokenTraining(PixelTraining):
    """`Discrete` as the loop sees it; ``codes`` are the pictures', where tokens are codes."""

    def __init__(
        self,
        recipe: Discrete,
        model: TokenModel,
        data: Pictures | Characters,
        codes: Int[Tensor, "n h w"] | None = None,
    ):
        rows: Any = data  # text has rows too
        super().__init__(recipe, model, rows)
        self.discrete, self.codes = recipe, codes

    def tokens(self, rows: list[int]) -> Int[Tensor, "n *shape"]:
        """The clean tokens of these rows."""
        if isinstance(self.pictures, Characters):
            return self.pictures.windows(rows)
        if self.codes is not None:
            return self.codes[rows]
        return self.model.encode_image(to_tensor([self.pictures.picture(row) for row in rows]))

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        rows = draw.integers(len(self.pictures), size, rng).tolist()
        dropped = draw.uniform(size, rng) < self.discrete.label_dropout
        labels = None
        if self.model.labels:
            labels = torch.tensor([self.pictures.label(i) for i in rows]).masked_fill(dropped, len(self.model.labels))
        return {"x": self.tokens(rows), "labels": labels}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device, process = self.model.device, self.discrete.process()
        x = batch["x"].to(device)
        t = draw.strata(len(x), rng).clamp(min=self.discrete.least_time)
        # Uniform numbers by way of normal ones, which are drawn the same however a batch is cut.
        uniform = torch.special.ndtr(draw.normal(x.shape, rng).double()).clamp(max=1 - 1e-12).to(device)
        noisy = process.diffuse(x, t.to(device), uniform)
        numbers = None if batch["labels"] is None else Labels(batch["labels"].to(device)).numbers
        logits = self.model.network(noisy, t.to(device, torch.float32), numbers).float()
        loss = cross_entropy(logits, x, noisy, t.to(device), process.mask)
        return loss.mean(), {"nats": loss.mean().detach()}


def cross_entropy(
    logits: Float[Tensor, "batch *dims values"],
    x: Int[Tensor, "batch *dims"],
    noisy: Int[Tensor, "batch *dims"],
    t: Float[Tensor, "batch"],
    mask: int | None,
) -> Float[Tensor, "batch"]:
    """-log p(x) of each token, averaged over the tokens of a sample: all alike, or with a mask 1 / t of the masked."""
    each = -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]
    if mask is not None:
        each = torch.where(noisy == mask, each, 0.0) / t.to(each).view(-1, *[1] * (x.ndim - 1))
    return each.flatten(1).mean(1)
