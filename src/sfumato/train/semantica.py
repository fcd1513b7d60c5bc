"""Semantica: a picture is shown, and another one that belongs with it is to be drawn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import ModelMixin
from jaxtyping import Float, UInt8
from torch import Tensor

from sfumato.data.pictures import Pictures, open_pictures
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, at_least
from sfumato.metrics.features import extract
from sfumato.nets import VariationUViT
from sfumato.pipeline import Seen, VariationModel
from sfumato.pipeline.seeing import Eye

from . import draw
from .cosine import CosineRecipe
from .episodes import CLASSES, FOLDERS, Episodes, Pairs, episodes_of
from .loop import Run
from .pixels import PixelTraining
from .state import configuration, goes_on, rows_of


@dataclass(frozen=True, kw_only=True)
class Semantica(CosineRecipe):
    """Pixel diffusion conditioned on one picture, trained on pairs of different pictures that belong together.

    arXiv:2405.14857. A pair (c, x) of an episode (the paper's: a web page) is drawn anew for every row, episodes
    uniformly; a frozen encoder E sees c; the loss is E ||eps - eps_hat(z_t, t, E(c))||^2 with z_t from x. Since x is
    never c, the model cannot learn to copy. Pairs are kept whose cosine by E lies between the two bounds of
    ``similar``: below are unrelated pictures, above near duplicates, with which the model would learn to copy after
    all. With the probability ``label_dropout`` E(c) is replaced by a learned null, for guidance on the picture:
    eps = eps_null + w (eps_c - eps_null). `sfumato sample --image` draws with the model, from any data set.

    The network is simple diffusion's U-ViT (arXiv:2301.11093); its transformer's blocks attend to the encoder's
    tokens, and the encoder's one vector joins the log-SNR.

    Unconfirmed: schedule, prediction and optimiser (those of simple diffusion), the share of dropped conditions, which
    of the two variants the paper's final model is. Reconstructed: the bounds of ``similar``, of which the paper gives
    no values; that cross-attention stands behind each transformer block.
    Differs from the paper: the encoder sees pictures of the model's size, enlarged to its own; an episode is what the
    data call one, not a web page.
    Cost: one network call with gradients, with tokens a call of the encoder too, per update; the encoder once for every
    picture before.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **CosineRecipe.EXAMPLE, "pictures": 60, "encoder": "random-cnn", "quantiles": True, "similar": (0.05, 0.95),
        "noise_size": 8, "channels": (8,), "blocks": (1,), "depth": 1, "width": 16, "head_dim": 8, "embedding": 16,
        "sampling_steps": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dinov2-256": {
            "size": 256, "encoder": "facebook/dinov2-large", "factor": 2, "channels": (128, 256, 512),
            "blocks": (2, 2, 2), "depth": 36, "width": 2048, "head_dim": 128, "embedding": 1024, "dropout": 0.2,
            "flip": True, "batch": 2048, "lr": 1e-4, "warmup": 10_000, "precision": "bf16",
        },
        "small-sketch": {
            "size": 32, "quantiles": True, "similar": (0.05, 0.95), "factor": 2, "channels": (48,), "blocks": (1,),
            "depth": 4, "width": 192, "head_dim": 48, "dropout": 0.0, "batch": 64, "lr": 1e-3, "warmup": 200,
            "ema": 0.999, "updates": 10_000, "sampling_steps": 128, "cfg_scale": 1.5,
        },
        "small-digits": {
            "data": "digits", "size": 8, "noise": "cosine", "encoder": "pixels", "quantiles": True,
            "similar": (0.05, 0.95), "channels": (32,), "blocks": (1,), "depth": 2, "width": 96, "head_dim": 32,
            "embedding": 96, "dropout": 0.0, "batch": 64, "lr": 3e-3, "warmup": 100, "ema": 0.995, "updates": 3000,
            "sampling_steps": 64, "cfg_scale": 2.0,
        },
    }  # fmt: skip
    """``dinov2-256``: the paper's kind of model as far as it is known, by its lineage; ``small-*``: for a CPU,
    ``small-sketch`` untuned."""

    classes: ClassVar[bool] = False  # type: ignore[misc]  # a picture is what it is told
    label_dropout: Decay = 0.1
    """Share of pictures for which nothing is shown, for guidance."""
    episodes: str = CLASSES
    """What groups pictures: "classes", "folders" (the one that each lies in), or columns of a table, as in
    "{album}"."""
    pairs: Literal["different", "same"] = "different"
    """"different": another picture of the episode is shown; "same": the picture itself, the baseline that copies."""
    similar: tuple[float, float] = (0.3, 0.9)
    """Cosines by the encoder between which a pair is kept; -1 1 keeps all."""
    quantiles: bool = False
    """The bounds of ``similar`` are shares of the pairs' cosines, from 0 to 1, instead of cosines."""
    largest_episode: Annotated[int, at_least(2)] = 1000
    """Pictures of an episode at most; of a larger one so many are drawn, once."""
    encoder: str = "oracle"
    """What sees the picture: "oracle" (the sketch world's), "random-cnn", "pixels", or a vision model of
    `transformers`, a folder or hub id."""
    variant: Literal["tokens", "cls"] = "tokens"
    """"tokens": the network attends to the encoder's tokens as well; "cls": it is told one vector only."""
    channels: tuple[Count, ...] = (64,)
    """Channels of the convolutional levels, the finest first."""
    blocks: tuple[Natural, ...] = (2,)
    """Residual blocks of each, on the way down and again on the way up."""
    depth: Natural = 6
    """Transformer blocks."""
    width: Count = 256
    """Width of the transformer."""
    head_dim: Count = 64
    """Channels of an attention head."""
    embedding: Count = 256
    """Width of the embedding of log-SNR and picture."""
    dropout: Decay = 0.1
    """Dropout where a feature map's side is at most 16."""
    factor: Count = 1
    """1, 2 or 4: how many times smaller than the picture the first feature map is."""
    save_memory: bool = False
    """Compute activations twice instead of keeping them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.similar
        if not (0 if self.quantiles else -1) <= low < high <= 1:
            raise BadInput(
                f"similar: two numbers, the lower first, {'shares from 0' if self.quantiles else 'cosines from -1'} "
                f"to 1, not {low} {high}"
            )
        if self.episodes not in (CLASSES, FOLDERS) and not ("{" in self.episodes and "}" in self.episodes):
            raise BadInput(f'episodes: "classes", "folders" or columns as in "{{album}}", not {self.episodes!r}')

    @cached_property
    def _eye(self) -> Eye:
        return Eye(self.encoder)

    def open(self) -> Pictures:
        caption = "{caption}" if self.episodes in (CLASSES, FOLDERS) else self.episodes
        return open_pictures(self.data, self.size, caption, seed=self.seed, count=self.pictures)

    def groups(self, pictures: Pictures) -> Episodes:
        """The episodes of the data."""
        return episodes_of(pictures, self.episodes)

    def network(self, classes: int) -> ModelMixin:
        blank = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8)
        shape = self._eye.tokens(blank).shape[1:] if self.variant == "tokens" else (0, 0)
        net = VariationUViT(
            self.size, 3, self._eye.whole(blank).shape[1], *shape, self.channels, self.blocks, self.depth, self.width,
            self.head_dim, self.embedding, self.dropout, factor=self.factor,
        )  # fmt: skip
        if self.save_memory:
            net.enable_gradient_checkpointing()
        return net

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), "encoder": self.encoder, "encoder_sha256": self._eye.sha256}

    def model(self, labels: tuple[str, ...]) -> VariationModel:
        """A fresh model; ``labels`` are none."""
        shape = (3, self.size, self.size)
        return VariationModel(self.network(0), self.process(), self.prediction, shape, (), self.sampling())

    def grid(self, model: Any, pictures: Pictures, rng: torch.Generator, n: int) -> Float[Tensor, "n 3 h w"]:
        """Variations of one picture in each row of the grid."""
        rows = torch.randint(len(pictures), (max(1, n // 4),), generator=rng).repeat_interleave(4)[:n]
        seeds = torch.randint(2**31, (len(rows),), generator=rng).tolist()
        steps = min(50, model.defaults["sampling_steps"])
        return model.draw(None, seeds, sampling_steps=steps, cond=model.seen(pixels(pictures, rows.tolist())))

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        pictures = self.open()
        own = {**self.beyond(), **rows_of(self.data, pictures)}
        goes_on(out / "training", configuration(self.name(), self, own))
        groups = self.groups(pictures)
        torch.manual_seed(self.seed)
        model = self.model(())
        training = SemanticaTraining(self, model, pictures, groups, progress)
        run = Run(training, self, out / "training", own)
        run.fit(progress)
        model.network.eval()
        run.finish(lambda: model.save(out / "model", overwrite=overwrite, provenance=self.made()))


class SemanticaTraining(PixelTraining):
    """`Semantica` as the loop sees it. Pairs are judged by clean pictures; only what is to be drawn is mirrored."""

    def __init__(
        self, recipe: Semantica, model: VariationModel, pictures: Pictures, groups: Episodes, progress: bool = False
    ):
        super().__init__(recipe, model, pictures)
        self.semantica, self.shown = recipe, model
        features = extract(pictures, recipe._eye.extractor, progress=progress)
        self.pairs = Pairs(features, groups, recipe.similar, recipe.quantiles, recipe.largest_episode, recipe.seed)
        if dropped := len(groups) - len(self.pairs.episodes):
            warnings.warn(f"{dropped} of {len(groups)} episodes have no pair that is similar enough", stacklevel=2)

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        shown, drawn = self.pairs.draw(size, rng).T.tolist()
        if self.semantica.pairs == "same":
            shown = drawn
        x = self.recipe.read(self.pictures, drawn)
        seen = pixels(self.pictures, shown)
        if self.recipe.flip:
            mirrored = (draw.uniform(size, rng) < 0.5).reshape(-1, 1, 1, 1)
            x = torch.where(mirrored, x.flip(-1), x)
            if self.semantica.pairs == "same":  # what is shown is the target itself
                seen = torch.where(mirrored, seen.flip(-1), seen)
        given = draw.uniform(size, rng) >= self.recipe.label_dropout
        return {"x": x, "shown": seen, "given": given}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.model.device
        x = batch["x"].to(device)
        t = self.recipe.times(len(x), rng).to(device)
        eps = draw.normal(x.shape, rng).to(device)
        cond: Seen = self.shown.seen(batch["shown"]).replace(given=batch["given"].to(device))
        told: Any = cond
        return self.recipe.loss(self.model.denoiser, x, t, eps, told).mean(), {}


def pixels(pictures: Pictures, rows: list[int]) -> UInt8[Tensor, "row 3 height width"]:
    """Pictures of 8 bits, as an encoder takes them."""
    return torch.stack([torch.from_numpy(pictures.picture(row).copy()) for row in rows]).permute(0, 3, 1, 2)
