"""What classifiers share: data, the run through the training loop, the measuring, and the folder that comes of it.

A method is a dataclass that inherits `Classifier` and says its `network`, and where they are its own its `loss`,
`augmented` pictures, `rate` and the `figures` of its card, its `recipe`, what is to `settle` after training, and
`sheets` of pictures for a page. The folder is one that `transformers` loads where the network is one of its own, else
``model.safetensors`` with the network's own keys; `sfumato audit --detector` and `sfumato score --extractor` take both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfumato.data.pictures import Pictures, open_pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, Share
from sfumato.foreign import read_tensors, reading
from sfumato.memory import require_memory
from sfumato.metrics.trained import described
from sfumato.plan import Plan
from sfumato.settings import Tuned
from sfumato.train import draw
from sfumato.train.loop import Run
from sfumato.train.outputs import InFolder
from sfumato.train.recipe import Recipe, Turn
from sfumato.train.schedule import Schedule
from sfumato.train.state import configuration, goes_on, rows_of

from .parts.data import flipped, measured, shifted, split
from .parts.folder import inner, write
from .parts.rules import Rule, averaged_statistics, updating
from .parts.sheet import Sheet


@dataclass(frozen=True, kw_only=True)
class Classifier(Tuned, Schedule, InFolder):
    """Fields and run of every classifier; not a method itself."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "pictures": 6, "size": 16, "updates": 4, "batch": 2, "warmup": 0, "checkpoint_every": 1, "track": "none",
        "held_out": 0.3,
    }  # fmt: skip
    """Settings that take a second, for the tests that all classifiers share; with a network as small as those."""

    STARTS: ClassVar[frozenset[str]] = frozenset()
    """Settings that say where training starts: a trained network is made without them."""

    data: str = "sketch"
    """"sketch", "digits", a folder whose folders are classes, Parquet files, WebDataset shards, or hub:OWNER/NAME."""
    test: str | None = None
    """Other pictures of the same classes to measure on; by default ``held_out`` of the data."""
    held_out: Share = 0.1
    """Share of each class that is not trained on but measured, at least one picture; 0: all is trained on, and measured
    on too, which the card says."""
    pictures: Count = 40_000
    """How many pictures of the sketch world to draw."""
    size: Count = 64
    """Side of the pictures in pixels."""
    flip: bool = False
    """Mirror half of the pictures; not where that changes what they show, such as digits."""
    shift: Share = 0.125
    """Move each picture by up to this share of its side, its border repeated."""
    label_smoothing: Decay = 0.1
    """Share of the target that is spread evenly over all classes."""
    update_rule: Rule = "adamw"
    """AdamW with ``betas`` and ``eps``; Nesterov's ``momentum``; or RMSProp as TensorFlow has it (``betas[1]`` for the
    decay, ``eps`` inside the root, squares that start at 1) with ``momentum``. Weight decay falls on matrices and
    kernels only, not on biases or what batch normalisation learns."""
    momentum: Decay = 0.9
    """Of "sgd" and "rmsprop"; 0: none."""
    updates: Natural = 2000
    batch: Count = 64
    """Pictures in an update. Batch normalisation sees those of one micro-batch on one process."""
    lr: Positive = 3e-3
    weight_decay: NotNegative = 0.05
    ema: Decay = 0.0
    """Decay of the averaged weights; 0: the last weights are kept. The statistics of batch normalisation, which are not
    averaged, are then measured anew with the averaged weights, on ``batch`` times 20 training pictures."""
    checkpoint_every: Count = 200

    # What a method says

    @abstractmethod
    def network(self, labels: tuple[str, ...]) -> nn.Module:
        """A fresh network, from pictures in [-1, 1] to logits, whose ``features`` gives what the last layer sees;
        where `transformers` does not read the folder, ``from_features`` makes logits of that."""

    def loss(
        self, net: nn.Module, x: Float[Tensor, "batch 3 size size"], y: Int[Tensor, "batch"], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, a mean over the rows, and figures to log: by default the smoothed cross-entropy."""
        logits = net(x).float()
        right = (logits.argmax(1) == y).float().mean()
        return cross_entropy(logits, y, label_smoothing=self.label_smoothing), {"right": right.detach()}

    def augmented(self, x: Float[Tensor, "batch 3 size size"], rng: torch.Generator) -> Float[Tensor, "batch 3 s s"]:
        """Training pictures in [-1, 1], changed as chance has it; drawn with `sfumato.train.draw`."""
        x = flipped(x, rng) if self.flip else x
        return shifted(x, round(self.shift * self.size), rng) if self.shift else x

    def rate(self) -> Callable[[int], float] | None:
        """The learning rate at an update, where it is not the schedule's."""
        return None

    def figures(self, net: nn.Module, pictures: Pictures) -> dict[str, Any]:
        """How good the trained network is on ``pictures``, for its card."""
        return measured(net, pictures, self.batch, self.seed)

    def recipe(self, net: nn.Module, pictures: Pictures) -> Labelling:
        """How the loop sees it, where that is its own; what ``net`` is to hold before the first update is put there."""
        return Labelling(self, net, pictures)

    def settle(self, net: nn.Module, pictures: Pictures) -> None:
        """Change the trained network before it is measured and written, with the pictures it was trained on."""

    def sheets(self, folder: str | Path) -> tuple[Sheet, ...]:
        """What there is to see of the classifier in ``folder``, for a page; by default nothing."""
        return ()

    def open(self) -> Pictures:
        """The data."""
        return open_pictures(self.data, self.size, seed=self.seed, count=self.pictures)

    def parts(self, used: Collection[str] | None = None) -> tuple[Pictures, Pictures, str]:
        """Pictures to train on, pictures to measure on, and which these are, in words.

        Args:
            used: as for `split`.

        Raises:
            BadInput: fewer than two classes, a class with one picture; or classes of ``test`` that are others.
        """
        pictures = self.open()
        if self.test is None:
            return split(pictures, self.held_out, self.seed, self.data, used)
        other = open_pictures(self.test, self.size, seed=self.seed + 1, count=self.pictures)
        if other.label_names != pictures.label_names:
            raise BadInput(f"{self.test} and {self.data} have other classes: give pictures of the same to measure on")
        return split(pictures, 0, self.seed, self.data, used)[0], other, f"the pictures of {self.test}"

    # The run

    @classmethod
    def name(cls) -> str:
        """The catalogue's name: the module's."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    def made(self) -> dict[str, Any]:
        """How the classifier is made, for its record."""
        return {"recipe": f"classify {self.name()}", "config": asdict(self)}

    def plan(self) -> Plan:
        """Memory; the time is told by the first updates."""
        require_memory(12 * self.size**2 * (4 + self.batch), f"batches of {self.batch:,} pictures of this size")
        weights = 4 * sum(p.numel() for p in self.network(self.open().label_names).parameters())
        memory = {"weights": weights * (2 if self.ema else 1), "gradients": weights, "optimiser": 2 * weights}
        return Plan(f"classify {self.name()} on {self.data}", memory=memory)

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        seen, unseen, told = self.parts()
        own = {**self.beyond(), **rows_of(self.data, seen)}
        goes_on(out / "training", configuration(self.name(), self, own))
        labels = tuple(seen.label_names)
        torch.manual_seed(self.seed)
        recipe = self.recipe(self.network(labels).train(), seen)
        run = Run(recipe, self, out / "training", own)
        run.fit(progress)
        if self.ema:
            rng = torch.Generator().manual_seed(self.seed)
            averaged_statistics(recipe.net, (recipe.batch(0, rng, self.batch)[0] for _ in range(20)))
        net = recipe.net.eval().requires_grad_(False)
        self.settle(net, seen)
        card = {"measured_on": told, "trained_on": len(seen), "labels": len(labels)}
        card |= self.figures(net, unseen)
        run.finish(lambda: self.save(out / "model", net, labels, card, overwrite))

    def save(
        self, folder: Path, net: nn.Module, labels: tuple[str, ...], card: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        """Write a network of this method, whoever trained it, so that `read` and detectors take the folder; ``card``
        says how good it is."""
        about = {"classifier": self.name(), "labels": labels, "size": self.size}
        write(folder, net.cpu(), about, self.made(), card, overwrite)

    def trained_on(
        self, x: Float[Tensor, "n 3 size size"], y: Int[Tensor, "n"], labels: tuple[str, ...], seed: int
    ) -> nn.Module:
        """A fresh network, trained in memory by this recipe on pictures in [-1, 1] that need not be in whole levels."""
        method = replace(self, seed=seed, track="none", grid_every=0)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            recipe = LabellingTensors(method, method.network(labels).train(), x.cpu(), y.cpu())
        Run(recipe, method).fit(progress=False)
        if method.ema:
            rng = torch.Generator().manual_seed(seed)
            averaged_statistics(recipe.net, (recipe.batch(0, rng, method.batch)[0] for _ in range(20)))
        return recipe.net.eval().requires_grad_(False)

    @classmethod
    def of(cls, folder: str | Path) -> Self:
        """The settings with which the classifier in a folder was trained.

        Raises:
            BadInput: no such folder, or one of another method.
        """
        about, config = described(folder)
        if about["classifier"] != cls.name():
            raise BadInput(f"{folder} was made by classify {about['classifier']}, not by {cls.name()}")
        known = {f.name for f in fields(cls) if f.init}
        # JSON has lists where settings have tuples
        settings: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in config.items() if n in known}
        with reading(folder, "a classifier"):
            return cls(**settings)

    @classmethod
    def read(cls, folder: str | Path) -> nn.Module:
        """The network of a folder that `run` wrote, frozen, from pictures in [-1, 1] to logits.

        Raises:
            BadInput: no such folder, one of another method, or damaged.
        """
        about, config = described(folder)
        if about["classifier"] != cls.name():
            raise BadInput(f"{folder} was made by classify {about['classifier']}, not by {cls.name()}")
        known = {f.name for f in fields(cls) if f.init} - {f.name for f in fields(Schedule)} - cls.STARTS
        method = cls(**{name: value for name, value in config.items() if name in known})
        net = method.network(tuple(about["labels"]))
        state, _ = read_tensors(Path(folder) / "model.safetensors", "a classifier")
        with reading(folder, "a classifier"):
            inner(net).load_state_dict(state)
        return net.eval().requires_grad_(False)


class Labelling(Recipe):
    """A `Classifier` as the loop sees it."""

    def __init__(self, method: Classifier, net: nn.Module, pictures: Pictures):
        self.method, self.net, self.pictures = method, net, pictures
        self.name = method.name()

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.net}

    def batch(self, step: int, rng: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        rows = draw.integers(len(self.pictures), size, rng).tolist()
        x = to_tensor([self.pictures.picture(row) for row in rows])
        return self.method.augmented(x, rng), torch.tensor([self.pictures.label(row) for row in rows])

    def loss(self, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.net.parameters()).device
        return self.method.loss(self.net, batch[0].to(device), batch[1].to(device), rng)

    def turns(self) -> list[Turn]:
        make = updating(self.method.update_rule, self.method, self.method.momentum)
        return [Turn(name="all", loss=self.loss, optimizer=make, lr=self.method.rate())]


class LabellingTensors(Labelling):
    """`Labelling` of pictures that lie in a tensor, in [-1, 1]."""

    def __init__(self, method: Classifier, net: nn.Module, x: Float[Tensor, "n 3 size size"], y: Int[Tensor, "n"]):
        self.method, self.net, self.x, self.y = method, net, x, y
        self.name = method.name()

    def batch(self, step: int, rng: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        rows = draw.integers(len(self.x), size, rng)
        return self.method.augmented(self.x[rows], rng), self.y[rows]
