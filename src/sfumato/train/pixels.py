"""What the recipes of pixel-space diffusion share: data, the drawing of noise, the run, and what is saved.

A recipe is a dataclass that inherits `PixelRecipe` and says what is its own: `process`, `network`, usually `loss`, and
how its model samples (`sampling`). Everything else (loop, checkpoints, saving) is the same for all and lives here.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.data.pictures import Pictures, open_pictures, to_tensor
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive
from sfumato.memory import require_memory
from sfumato.noise import Denoiser, GaussianProcess
from sfumato.noise.process import Prediction
from sfumato.pipeline import ImageModel, Labels
from sfumato.plan import Plan
from sfumato.settings import Tuned

from . import draw
from .loop import Run
from .outputs import InFolder
from .recipe import Recipe
from .schedule import Schedule
from .state import configuration, goes_on, rows_of


@dataclass(frozen=True, kw_only=True)
class PixelRecipe(Tuned, Schedule, InFolder):
    """Fields and run of every pixel-space recipe; not a method itself."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "pictures": 6, "size": 8, "updates": 4, "batch": 2, "warmup": 1, "checkpoint_every": 1, "grid_every": 2,
        "track": "none",
    }  # fmt: skip
    """Settings that take a second, for the tests that all recipes share; with a network as small as those."""

    data: str = "sketch"
    """"sketch", "digits", a folder of pictures, Parquet files, WebDataset shards, or hub:OWNER/NAME."""
    pictures: Count = 40_000
    """How many pictures of the sketch world to draw."""
    size: Count = 32
    """Side of the pictures in pixels."""
    classes: bool = True
    """Condition on the data's classes, where it has any."""
    label_dropout: Decay = 0.1
    """Share of pictures shown without their class, for guidance."""
    flip: bool = False
    """Mirror half of the pictures."""
    updates: Count = 20_000
    batch: Count = 128
    """Pictures in an update."""
    lr: Positive = 1e-4
    warmup: Natural = 1000
    weight_decay: NotNegative = 0.0
    ema: Decay = 0.9999
    checkpoint_every: Count = 500
    grid_every: Natural = 1000

    prediction: ClassVar[Prediction] = "v"

    # What a recipe says

    @abstractmethod
    def process(self) -> GaussianProcess:
        """The noise process that the model is trained under."""

    @abstractmethod
    def network(self, classes: int) -> ModelMixin:
        """A fresh network with the signature of `sfumato.nets`; ``classes`` is 0 for data without."""

    def loss(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "batch channel height width"],
        t: Float[Tensor, "batch"],
        eps: Float[Tensor, "batch channel height width"],
        cond: Int[Tensor, "batch"] | None,
    ) -> Float[Tensor, "batch"]:
        """The loss of each picture at time ``t`` with noise ``eps``: by default the plain error of `compared`."""
        process = denoiser.process
        z = process.diffuse(x, t, eps)
        guess = process.convert(denoiser(z, t, cond), z, t, denoiser.prediction, self.compared)
        return (guess - {"eps": eps, "x0": x}[self.compared]).square().flatten(1).mean(1)

    @property
    def compared(self) -> Literal["eps", "x0"]:
        """Whose plain squared error `loss` is: the noise's, or the picture's."""
        return "eps"

    def times(self, n: int, rng: torch.Generator) -> Float[Tensor, "n"]:
        """Times of one batch: one uniform draw in each n-th of [0, 1], so that every batch covers all noise levels.

        Each time is uniform by itself; the batch mean of the loss varies less (arXiv:2107.00630, appendix I.1).
        """
        return draw.strata(n, rng)

    def sampling(self) -> dict[str, Any]:
        """How the saved model samples by default; see `ImageModel.defaults`."""
        return {}

    # The data and the run

    def open(self) -> Pictures:
        """The data."""
        return open_pictures(self.data, self.size, seed=self.seed, count=self.pictures)

    def read(self, pictures: Pictures, rows: list[int]) -> Float[Tensor, "row *sample"]:
        """The samples ``rows`` of what `open` opened, [-1, 1] for pictures."""
        return to_tensor([pictures.picture(row) for row in rows])

    def grid(self, model: ImageModel, pictures: Pictures, rng: torch.Generator, n: int) -> Float[Tensor, "n 3 h w"]:
        """Pictures to look at while training lasts, in [0, 1], drawn in 50 steps."""
        labels = [i % len(model.labels) for i in range(n)] if model.labels else None
        seeds = torch.randint(2**31, (n,), generator=rng).tolist()
        return model.draw(labels, seeds, sampling_steps=min(50, model.defaults["sampling_steps"]))

    def model(self, labels: tuple[str, ...]) -> ImageModel:
        """A fresh model for data with these classes."""
        network = self.network(len(labels))
        return ImageModel(network, self.process(), self.prediction, (3, self.size, self.size), labels, self.sampling())

    @torch.no_grad()
    def plan(self) -> Plan:
        """Memory, and time from one forward pass on the device that will train (a training step costs about three)."""
        require_memory(12 * self.size**2 * (4 + self.batch), f"batches of {self.batch:,} pictures of this size")
        model = self.model(self.labels_of(self.open()))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.network.to(device)

        def forward(n: int) -> float:
            began = time.perf_counter()
            model.denoiser(torch.zeros(n, *model.shape, device=device), 0.5, None).sum().item()
            return time.perf_counter() - began

        n, seconds = 1, forward(1)
        if seconds < 2:  # large networks take long enough for one picture to tell
            n = min(self.batch, 16)
            seconds = forward(n)
        weights = 4 * sum(p.numel() for p in model.network.parameters())
        memory = {"weights, averaged too": 2 * weights, "gradients": weights, "optimiser": 2 * weights}
        seconds *= 3 * self.batch / n * self.updates
        return Plan(f"train {self.name()} on {self.data}", memory=memory, seconds=seconds)

    def labels_of(self, pictures: Pictures) -> tuple[str, ...]:
        """The classes that the model is told: those of the data, or none."""
        return tuple(getattr(pictures, "label_names", ())) if self.classes else ()

    @classmethod
    def name(cls) -> str:
        """The catalogue's name: the module's."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    def made(self) -> dict[str, Any]:
        """How the model is made, for its record."""
        return {"recipe": f"train {self.name()}", "config": asdict(self)}

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        pictures = self.open()
        own = {**self.beyond(), **rows_of(self.data, pictures)}
        goes_on(out / "training", configuration(self.name(), self, own))
        torch.manual_seed(self.seed)
        model = self.model(self.labels_of(pictures))
        run = Run(PixelTraining(self, model, pictures), self, out / "training", own)
        run.fit(progress)
        model.network.eval()
        run.finish(lambda: model.save(out / "model", overwrite=overwrite, provenance=self.made()))


class PixelTraining(Recipe):
    """A `PixelRecipe` as the loop sees it."""

    def __init__(self, recipe: PixelRecipe, model: ImageModel, pictures: Pictures):
        self.recipe, self.model, self.pictures = recipe, model, pictures
        self.name = recipe.name()

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.model.network}

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        rows = draw.integers(len(self.pictures), size, rng).tolist()
        x = self.recipe.read(self.pictures, rows)
        if self.recipe.flip:
            x = torch.where((draw.uniform(size, rng) < 0.5).reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
        if not self.model.labels:
            return {"x": x, "labels": None}
        labels = torch.tensor([self.pictures.label(i) for i in rows])
        dropped = draw.uniform(size, rng) < self.recipe.label_dropout
        return {"x": x, "labels": labels.masked_fill(dropped, len(self.model.labels))}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.model.device
        x, labels = batch["x"].to(device), batch["labels"]
        t = self.recipe.times(len(x), rng).to(device)
        eps = draw.normal(x.shape, rng).to(device)
        cond = None if labels is None else Labels(labels.to(device))
        return self.recipe.loss(self.model.denoiser, x, t, eps, cond).mean(), {}

    @torch.no_grad()
    def grid(self, rng: torch.Generator, n: int = 16) -> Float[Tensor, "n 3 height width"]:
        """Pictures to look at while training lasts."""
        return self.recipe.grid(self.model, self.pictures, rng, n)
