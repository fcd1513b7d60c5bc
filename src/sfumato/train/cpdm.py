"""CPDM: classes come task by task; a diffusion model with a prototype of each draws those that are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato import catalog
from sfumato.data.pictures import Pictures
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, Share
from sfumato.nets import PrototypeUNet
from sfumato.noise import GaussianProcess, LinearBeta
from sfumato.noise.process import Prediction
from sfumato.pipeline import PrototypeModel
from sfumato.plan import Plan

from . import draw
from .continual import Tasks, named_tasks, split_tasks
from .course import Epoch
from .incremental import TaskRun
from .pixels import PixelRecipe
from .prototypes import Choice
from .words_of_classes import class_words

TIMESTEPS = 1000
"""Of the noise schedule's table."""


@dataclass(frozen=True, kw_only=True)
class CPDM(PixelRecipe):
    """Class-incremental learning by generative replay, with class prototypes and gradient projection.

    arXiv:2312.06710. Tasks bring classes that no other task has, and old data are not kept. Before a task the diffusion
    model of the task before draws ``replay`` pictures of every old class; a classifier, then the diffusion model, go on
    learning from the new pictures and the drawn ones. Against decay there are (a) a prototype of each class, its own
    picture that the classifier is surest of, beside the noisy input for ever; (b) a term that holds what the network
    predicts for a new class to what it predicts when told the old class of the nearest text,
    ``tau`` mean_i t_i ||eps(c_y) - sg eps(c_n)||^2 / (3HW); (c) projection of the updates of cross-attention (and of
    the map of the text in front of it) on what leaves their answers for old classes as they are (arXiv:2103.09762).
    Written: ``model`` (also the prototypes), ``classifiers/T`` after each task, as `sfumato classify` writes them,
    ``accuracy.json`` (the matrix, average accuracy and forgetting), ``prototypes.safetensors``, ``replay/``.

    Prototypes follow p <- (1 - decay) p + decay p0 - lr dL/dp / n, with the gradient before clipping.

    Reconstructed: all of (c): the paper's text could not be read; its mechanics are those of gradient projection
    memory, and which of the projections it covers is a guess. With one text vector (``tokens`` 1) queries and keys get
    no gradient, and only values and the text's map need protection. Unconfirmed: the paper's own numbers; defaults are
    those of the code of its first version, which has no projection.
    Differs from the paper: prototypes decay towards their first picture, for towards nothing they would be gone after a
    thousand updates (``prototype_towards``); they are learned in every update, where the published code changes them
    once; they are in [-1, 1], as the classifier sees pictures. It is the update since the task began that is projected,
    and not only the gradient, which Adam would turn back. The network is told the log-SNR. Full precision unless
    ``precision`` says otherwise. Text is random vectors unless ``text`` names a model, the classifier a small fresh
    ResNet. A plateau's cut of the rate comes once.
    Cost: a network call with gradients per update, and from the second task on two more for the new classes' share;
    the replay ``sampling_steps`` calls with guidance per picture.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **PixelRecipe.EXAMPLE, "pictures": 90, "updates": 2, "tasks": ("circle+square", "star+heart"), "replay": 2,
        "sampling_steps": 2, "text_width": 8, "channels": (8, 16), "layers": 1, "crossing": (4,), "heads": 2,
        "widths": (8,), "classifier_epochs": 1, "classifier_batch": 8, "classifier_lr": (1e-2,),
        "protect_pictures": 4,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "imagenet": {
            "updates": 150_000, "classifier_batch": 64, "classifier_epochs": 30, "classifier_flip": True,
            "widths": (64, 128, 256, 512),
        },
        "small-digits": {
            "data": "digits", "size": 8, "tasks": ("0+1+2+3", "4+5+6", "7+8+9"), "flip": False, "updates": 1000,
            "batch": 32, "lr": 3e-3, "warmup": 100, "replay": 60, "sampling_steps": 25, "cfg_scale": 2.0,
            "text_width": 32, "channels": (16, 32), "layers": 1, "crossing": (4,), "heads": 4, "widths": (16, 32),
            "classifier_batch": 64, "classifier_epochs": 30, "classifier_lr": (5e-2, 1e-2), "held_out": 0.2,
        },
        "small-cifar10": {
            "size": 32, "first": 0.4, "after": 3, "updates": 4000, "lr": 5e-4, "warmup": 200, "replay": 200,
            "sampling_steps": 50, "cfg_scale": 2.0, "text_width": 64, "channels": (48, 96, 96), "layers": 1,
            "crossing": (8,), "classifier_lr": (5e-2, 1e-2), "classifier_epochs": 30,
        },
    }  # fmt: skip
    """``imagenet``: the first version's; ``small-*``: for a CPU, untuned."""

    classes: ClassVar[bool] = True  # type: ignore[misc]  # there is nothing else to be told
    prediction: ClassVar[Prediction] = "eps"
    size: Count = 64
    label_dropout: Decay = 0.2
    """Share of pictures shown without their class's text, for guidance; the prototype is always shown."""
    flip: bool = True
    """Mirror half of the pictures that the diffusion model learns from; not where that changes what they show, such as
    digits."""
    updates: Count = 15_000
    """Updates of the diffusion model in each task."""
    batch: Count = 64
    """Pictures in an update of the diffusion model."""
    warmup: Natural = 500
    final_lr: NotNegative = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    ema: Decay = 0.0
    precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    """Mixed precision: "no", "bf16" or "fp16"; "auto" is bf16 on a GPU that has it."""

    tasks: tuple[str, ...] = ()
    """The classes of each task, joined by +, as in 0+1+2 3+4; classes that are in none are left out. By default all,
    as ``first`` and ``after`` say."""
    first: Share = 0.5
    """Share of the classes in the first task; 0: the tasks of ``after`` are all there are."""
    after: Count = 5
    """Tasks of one size after it."""
    order: Literal["natural", "seeded"] = "natural"
    """The order of the classes, where ``tasks`` does not say it: the data's, or drawn with ``seed``."""
    test: str | None = None
    """Other pictures of the same classes to measure accuracy on; by default ``held_out`` of the data."""
    held_out: Share = 0.1
    """Share of each class that is not trained on but measured."""
    validation: Share = 0.1
    """Share of the rest by which the classifier's weights are chosen."""
    replay: Natural = 20
    """Pictures drawn of every old class before a task; 0: none, so that old classes are forgotten. Four in five are
    trained on, with the others the classifier's weights are chosen."""
    sampling_steps: Count = 100
    """Steps in which they are drawn."""
    cfg_scale: float = 4.0
    """Guidance with which they are drawn, 1 + w in the paper's way of counting; 1 is none."""
    text: str = "random"
    """What gives a class's name its text vectors: "random", fixed ones, drawn for each name; or a text-to-image model
    (the paper's encoder is of the size of Stable Diffusion 1.x's): a name, folder or hub id."""
    tokens: Count = 1
    """Text vectors of a class: 1, the one where the text ends; more, the first ones of the text encoder."""
    text_width: Count = 768
    """Length of random ones."""
    prototype: Choice = "confident"
    """Each class's picture at first: the one that the classifier is surest of, or "unsure" of most; the "mean" of the
    class, "noise"; or "none": the network does not look at any."""
    prototype_lr: NotNegative = 1e-2
    """Rate at which the new classes' prototypes are learned; old ones never change. 0 with a decay of 0: frozen."""
    prototype_decay: Share = 1e-2
    """Share of the way to their first picture, in every update that has pictures of the class."""
    prototype_towards: Literal["start", "zero"] = "start"
    """Where they decay to; "zero" is the published rule."""
    tau: NotNegative = 1e-4
    """Weight of the term that holds new classes to their old neighbours; 0: none."""
    neighbour: Literal["cosine", "euclidean"] = "cosine"
    """By which the nearest old class is found, of text vectors."""
    protect: tuple[Literal["text_proj", "k", "v", "q", "out"], ...] = ("text_proj", "k", "v")
    """Which maps of cross-attention are projected; none: no projection. What "text_proj", "k" and "v" see is text, and
    kept exactly; of "q" and "out" samples are kept, of pictures at any time."""
    threshold: Positive = 0.97
    """Share of the energy of what "q" and "out" see that is kept after the first task."""
    threshold_rise: NotNegative = 0.003
    """What is added to it with every task, up to 1."""
    protect_pictures: Count = 256
    """Pictures of a task whose features "q" and "out" are shown."""
    channels: tuple[Count, ...] = (128, 128, 256, 256, 512, 512)
    """Channels of the levels."""
    layers: Count = 2
    """Residual blocks of each level."""
    crossing: tuple[Count, ...] = (4,)
    """Sides of feature maps with cross-attention, besides the smallest."""
    heads: Count = 8
    """Heads of the attention."""
    classifier: str = "plain"
    """Method of `sfumato classify` whose network is trained."""
    backbone: str = "resnet"
    """Of "plain", as there; "transformers:FOLDER" goes on from a trained one."""
    widths: tuple[Count, ...] = (48, 96, 160, 256)
    """Of its "resnet"."""
    classifier_batch: Count = 256
    """New pictures in an update of the classifier, and as many drawn ones."""
    classifier_flip: bool = False
    """Mirror half of the classifier's pictures, as the published code does for ImageNet alone."""
    classifier_epochs: Count = 100
    """Epochs of the classifier in each task, at most."""
    classifier_lr: tuple[Positive, ...] = (5e-2, 1e-2, 5e-3, 1e-3, 1e-4, 1e-5)
    """Rates of the classifier's SGD; of several all are tried in the first task and the best is kept."""
    classifier_weight_decay: NotNegative = 5e-4
    """Its weight decay."""
    momentum: Decay = 0.9
    """Its momentum."""
    patience: Count = 5
    """Epochs without a better accuracy after which its rate falls to a tenth."""
    stop: Count = 10
    """Epochs without a better accuracy after which it ends."""
    epoch: Epoch = "longest"
    """An epoch ends with the longer of new and drawn pictures, the others begin anew; or with the "shortest"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.classifier_lr:
            raise BadInput("classifier_lr: give at least one rate")
        if self.threshold > 1:
            raise BadInput(f"threshold must be at most 1, got {self.threshold}: it is a share")
        if not self.validation:
            raise BadInput("validation must be more than 0: the classifier's weights are chosen by it")
        if self.sampling_steps > TIMESTEPS:
            raise BadInput(f"sampling_steps must be at most {TIMESTEPS}, got {self.sampling_steps}")

    def process(self) -> GaussianProcess:
        return GaussianProcess(LinearBeta(train_steps=TIMESTEPS).discrete())

    def times(self, n: int, rng: torch.Generator) -> Float[Tensor, "n"]:
        """Timesteps of the table, uniform, as times."""
        return (draw.integers(TIMESTEPS, n, rng).double() + 1) / TIMESTEPS

    def network(self, classes: int, text_width: int | None = None) -> PrototypeUNet:
        return PrototypeUNet(
            self.size, 3, classes, self.tokens, text_width or self.text_width, self.prototype != "none", self.channels,
            self.layers, self.crossing, self.heads,
        )  # fmt: skip

    def sampling(self) -> dict[str, Any]:
        settings = {"sampling_steps": self.sampling_steps, "cfg_scale": self.cfg_scale}
        return {"scheduler": "held-ddim", "clip": False, **settings}  # the sampler clips by itself

    def model(self, labels: tuple[str, ...]) -> PrototypeModel:
        """A fresh model, which knows the text of these classes and has no prototypes yet."""
        words = class_words(self.text, labels, self.tokens, self.text_width)
        network = self.network(len(labels), words.shape[2])
        network.words.copy_(words)
        network.prototypes.requires_grad_(self.learns_prototypes)
        shape = (3, self.size, self.size)
        return PrototypeModel(network, self.process(), self.prediction, shape, labels, self.sampling())

    @property
    def learns_prototypes(self) -> bool:
        """Whether prototypes change while their task lasts."""
        return self.prototype != "none" and max(self.prototype_lr, self.prototype_decay) > 0

    def sequence(self, labels: tuple[str, ...]) -> Tasks:
        """The tasks, for data of these classes.

        Raises:
            BadInput: classes that are not there, or in two tasks; classes that cannot be cut so.
        """
        if not labels:
            raise BadInput(f"{self.data} has no classes: give pictures in folders, one a class, or with labels")
        if self.tasks:
            # A class may have a + in its own name, if it is a task of its own.
            apart = [[task] if task in labels else [n for n in task.split("+") if n] for task in self.tasks]
            return named_tasks(labels, apart)
        return split_tasks(labels, self.first, self.after, self.seed if self.order == "seeded" else None)

    def labels_of(self, pictures: Pictures) -> tuple[str, ...]:
        """The classes of all tasks, in the data's order."""
        used = {name for task in self.sequence(tuple(pictures.label_names)) for name in task}
        return tuple(name for name in pictures.label_names if name in used)

    def judge(self) -> Any:
        """The method of `sfumato classify` that gives the classifier, and cuts the data."""
        method: Any = catalog.get(self.classifier, "classify").load()
        same = ("data", "test", "held_out", "pictures", "size", "seed", "backbone", "widths", "momentum")
        settings = {name: getattr(self, name) for name in same}
        settings |= {
            "flip": self.classifier_flip, "label_smoothing": 0.0, "shift": 0.0, "update_rule": "sgd",
            "batch": self.classifier_batch, "lr": self.classifier_lr[0], "weight_decay": self.classifier_weight_decay,
            "track": "none",
        }  # fmt: skip
        known = {f.name for f in fields(method) if f.init}
        return method(**{name: value for name, value in settings.items() if name in known})

    def plan(self) -> Plan:
        """Memory, and the time of the diffusion model's updates in all tasks."""
        one = super().plan()
        tasks = len(self.sequence(tuple(self.open().label_names)))
        return dataclasses.replace(one, seconds=None if one.seconds is None else one.seconds * tasks)

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        TaskRun(self, out, progress).run(overwrite)


