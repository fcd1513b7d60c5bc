"""SFD: forgets while it distills the model into one step, from nothing but its own samples (arXiv:2409.11219)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sfumato.data.cases import names, say
from sfumato.data.pictures import open_pictures
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, Share
from sfumato.metrics.detectors import Detector, make_detector
from sfumato.noise import GaussianProcess
from sfumato.pipeline import ImageModel, Text2Image, few_steps
from sfumato.pipeline.backward import Learning
from sfumato.pipeline.distilled import check_few_steps
from sfumato.text import counted

from .parts.finetune import ByGradient, make_plan
from .parts.forgetting import Forgetting
from .parts.score_identity import sigmas_of

if TYPE_CHECKING:
    from sfumato.plan import Plan

Override = Literal["anchor", "random", "likeliest", "sampled"]
Guide3 = tuple[float, float, float]
NEAR = 1.001
"""How far beyond the table of noise levels a level may lie: the ends as messages round them are in it."""


def overridden(prompt: str, concept: str, anchor: str) -> str:
    """``prompt`` with ``anchor`` wherever it names the concept, as whole words in any case or their plural."""
    return " ".join(say(prompt, concept, anchor).split())


@lru_cache(maxsize=1)
def _captions_of(source: str, size: int, seed: int, count: int) -> tuple[str, ...]:
    """The first captions of a source of pictures, each once; read once, though asked for by check and run."""
    found = open_pictures(source, size, seed=seed, count=count)
    return tuple(dict.fromkeys(found.caption(i) for i in range(min(len(found), count))))


@dataclass(frozen=True, kw_only=True)
class SFD(ByGradient):
    """Score forgetting distillation (arXiv:2409.11219): a one-step generator of everything but the concepts.

    Three copies of the model: the teacher, a fake score that learns what the generator draws (`fake_score_loss`), and
    the generator, which learns by `score_identity_loss` to be what the teacher knows. Asked for what remains, all three
    are told the same; asked for a concept, the teacher is told what overrides it, so that the generator draws that
    instead. Each update is a step of the fake score, then one of the generator; every picture is the generator's own.
    The result draws in one step without guidance, a pipeline or an `ImageModel` as the teacher is.

    For an `ImageModel` the concepts are class names: all others remain. A pipeline is to keep the prompts of
    ``preserve`` and ``captions``, or the words of the world that it knows; captions that name a concept are used to
    forget it.

    The losses sum over a picture's elements, as ``clip_value`` and the learning rates need.

    Cost of an update and picture: four passes of the generator, two of them backward too; two of the fake score forward
    and backward; and two of teacher and fake score that are differentiated through. All but the generator's are double
    with guidance. Memory: three networks, two optimisers. Defaults are the published ones for Stable Diffusion 1.5; its
    runs start from a generator that was distilled before, which ``distill_updates`` does here.

    Differs from the published code: times and the generator's noise level are given as sigma, which makes the same
    timesteps under its two tables; the concept is replaced as a whole word, or its plural; rows whose numbers are
    not finite are left out of a loss, but where none is left, the run stops; networks run without dropout unless
    ``dropout`` asks for it (its class models train with 0.1). Its averaged weights decay at one rate from the start.
    For Stable Diffusion it asks a tenth of the fake score's pictures for nothing (see ``unconditional``), draws other
    prompts for the generator's turn than for the fake score's, and clips no gradients but the generator's, and those in
    half precision only, where ``eps`` is 1e-6. Its second stage for classes is a new run, from the averaged generator
    and with the first stage's fake score for a teacher; here, as in the paper, the teacher stays, and all else goes on.
    The paper's figures were not confirmed here.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {
        "lr": (3e-5, 1e-4), "updates": (300, 400), "forget_weight": (0.01, 0.1, 1.0),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "cifar10": {
            "alpha": 1.2, "forget_weight": 0.01, "fake_forget_weight": 0.01, "lr": 1e-5, "fake_lr": 1e-5,
            "updates": 50_000, "batch": 128, "ema": 0.9999, "dropout": 0.1,
        },
        "cifar10-two-stage": {
            "alpha": 1.2, "forget_weight": 0.01, "fake_forget_weight": 0.01, "lr": 1e-5, "fake_lr": 3e-5,
            "distill_updates": 50_000, "updates": 100_000, "batch": 128, "ema": 0.9999, "dropout": 0.1,
        },
        "stl10": {
            "alpha": 1.2, "forget_weight": 0.01, "fake_forget_weight": 0.01, "lr": 1e-5, "fake_lr": 3e-5,
            "updates": 50_000, "batch": 64, "ema": 0.9999, "dropout": 0.1,
        },
        "sketch": {
            "captions": "sketch", "n_captions": 4000, "cfg_scale": (3.0, 3.0, 3.0), "lr": 1e-4, "fake_lr": 1e-4,
            "updates": 400, "distill_updates": 200, "batch": 8,
        },
    }  # fmt: skip
    """Settings by name: the published ones for Stable Diffusion 1.5 (which are the defaults) and for models of classes;
    and some, untuned, for models as small as the embedded one."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "updates": 2, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3, "preserve": ("red square", "art"),
    }  # fmt: skip
    keeps_world: ClassVar[bool] = True

    alpha: NotNegative = 1.0
    """alpha of the generator's loss; 1.2 for the paper's models of classes."""
    sigma_init: Positive = 2.5
    """sigma / alpha of the noise that the generator starts from."""
    sigma_min: Positive = 0.1375
    """Least such noise level at which the scores are compared."""
    sigma_max: Positive = 13.0
    """Greatest one."""
    remain_weight: NotNegative = 1.0
    """Weight of what remains in the generator's loss."""
    forget_weight: NotNegative = 1.0
    """Weight of the concepts in it; 0.01 for the paper's models of classes, where more harms the neighbours."""
    fake_remain_weight: NotNegative = 1.0
    """Weight of what remains in the fake score's loss."""
    fake_forget_weight: NotNegative = 1.0
    """Weight of the concepts in it."""
    through_scores: bool = True
    """Differentiate through both scores; False is Diff-Instruct, another method."""
    updates: Count = 12_500
    """Steps of the generator, and of the fake score."""
    distill_updates: Natural = 0
    """So many of them first distil without forgetting, concepts included (the two-stage variant)."""
    batch: Count = 8
    """Pictures of what remains in an update, and of the concepts."""
    lr: Positive = 1e-6
    """Learning rate of the generator's Adam."""
    fake_lr: Positive = 3e-6
    """Learning rate of the fake score's Adam."""
    betas: tuple[Decay, Decay] = (0.0, 0.999)
    clip_value: NotNegative = 1.0
    """Largest absolute value of any gradient; 0: any."""
    ema: Decay = 0.0
    """Decay of the generator's averaged weights, reached gradually; 0: the last weights are kept."""
    dropout: Decay | None = None
    """Dropout in generator and fake score, each in its own turn only, where their network has such layers; None: none.
    """
    cfg_scale: Guide3 | None = None
    """Guidance of the fake score as it learns, of the fake score and of the teacher in the generator's loss; by default
    4.5 each where the model takes text, and 1 (none) where it takes classes."""
    negative: tuple[str, ...] = ()
    """Prompts, one drawn for each picture of a concept, in the place of the empty one in guidance: to forget a whole
    category."""
    negative_for: tuple[Literal["fake training", "fake", "teacher"], ...] = ("teacher",)
    """Whose guidance they enter."""
    unconditional: Share = 0.0
    """Share of pictures asked for nothing in particular instead, in both losses; the published code does so with 0.1 in
    the fake score's alone, and only under guidance."""
    override: Override = "anchor"
    """What the teacher is told for a concept: the same prompt with the ``anchors`` in its place (nothing, where none is
    named), or the class that is the anchor (where none is named, as "random"); for each picture another prompt or class
    of those that remain; the class that the ``detector`` finds likeliest in the fake score's x0, or one drawn by its
    scores."""
    detector: str = ""
    """For "likeliest" and "sampled": who tells the classes, as for `sfumato audit`."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts that ask for a concept, which stands for {}."""
    keywords: tuple[str, ...] = ()
    """Words, one drawn for each prompt that asks for a concept and put before or after it."""
    captions: str = ""
    """A source of pictures (a folder, Parquet files, "sketch", ...) of which the captions alone are read: prompts to
    keep, besides ``preserve``, and to forget with."""
    n_captions: Count = 20_000
    """How many captions at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise BadInput(f"sigma_min must be less than sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if self.distill_updates >= self.updates:
            told = f"of the {self.updates} updates to forget in, got {self.distill_updates}"
            raise BadInput(f"distill_updates must leave some {told}")
        if any("{}" not in t for t in self.templates):
            raise BadInput("a template needs {} where the concept stands, as in templates=['a photo of {}']")
        if (self.override in ("likeliest", "sampled")) != bool(self.detector):
            raise BadInput("name a detector with override 'likeliest' or 'sampled', and with no other")

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        """Whether the model can say that it draws in one step, and can be asked for a concept."""
        if isinstance(pipe, ImageModel):
            return bool(pipe.labels) and len(pipe.shape) == 3
        try:
            check_few_steps(pipe)
        except BadInput:
            return False
        return isinstance(pipe.process, GaussianProcess)

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        texts = isinstance(pipe, Text2Image)
        if not texts and (self.captions or self.negative or self.keywords):
            raise BadInput("captions, negative and keywords are for models that take text: leave them out")
        if texts and self.detector:
            raise BadInput("override by a detector is for models of classes: use 'anchor' or 'random'")
        if not texts and self.preserve:
            raise BadInput("all other classes of this model are preserved anyway: leave preserve out")
        if not texts:
            pipe.told([a for a in self.anchors if a] or list(self.concepts))
        low, high = sigmas_of(pipe.process)
        for name in ("sigma_init", "sigma_min", "sigma_max"):
            sigma = getattr(self, name)
            if not low / NEAR <= sigma <= high * NEAR:
                told = f"whose noise levels go from {low:.4g} to {high:.4g}"
                raise BadInput(f"{name} must be a noise level of this model, {told}, got {sigma:g}")
        if not self.remaining(pipe):
            raise BadInput("nothing remains to be kept: name prompts to preserve, or a source of captions")
        if not self.forgotten(pipe):
            raise BadInput("nothing asks for the concepts: give a template, as in templates=['a photo of {}']")

    # What is asked for

    def remaining(self, pipe: Any) -> list[str]:
        """What the generator is to go on drawing: classes, or prompts."""
        if not isinstance(pipe, Text2Image):
            return [label for label in pipe.labels if label not in self.concepts]
        told = [] if self.preserve is None and self.captions else list(self.kept(pipe))
        return [*told, *(c for c in self._captions(pipe) if not any(names(c, x) for x in self.concepts))]

    def forgotten(self, pipe: Any) -> list[tuple[str, str | None]]:
        """What asks for a concept, and what overrides it; None: something that remains."""
        if not isinstance(pipe, Text2Image):
            anchors = [self.anchor_for(i, "") or None for i in range(len(self.concepts))]
            fixed = self.override == "anchor"
            return [(c, a if fixed else None) for c, a in zip(self.concepts, anchors, strict=True)]
        found: list[tuple[str, str | None]] = []
        for index, concept in enumerate(self.concepts):
            asked = [t.replace("{}", concept) for t in self.templates]
            asked += [c for c in self._captions(pipe) if names(c, concept)]
            swap = partial(overridden, concept=concept, anchor=self.anchor_for(index, ""))
            found += [(p, swap(p) if self.override == "anchor" else None) for p in asked]
        return found

    def _captions(self, pipe: Text2Image) -> Sequence[str]:
        return _captions_of(self.captions, pipe.size, self.seed, self.n_captions) if self.captions else ()

    # The run

    def erased(self, pipe: Any, folder: Path | None = None) -> tuple[Any, dict[str, Any]]:
        """The generator, which draws in one step, and the losses of both networks."""
        generator, _, losses = self.train(pipe, folder)
        return generator, {"losses": losses}

    def train(self, pipe: Any, folder: Path | None = None) -> tuple[Any, Any, dict[str, list[float]]]:
        """The generator; the fake score, a model of many steps that has forgotten too; and the losses of each."""
        fake, generator = pipe.copy(own="full"), pipe.copy(own="full")
        recipe = Forgetting(self, pipe, fake, generator)
        losses = self.course(recipe, pipe, None if folder is None else folder / "training")
        for model in (fake, generator):
            model.network.eval()
        few_steps(generator, 1, start=recipe.start)
        generator.network.requires_grad_(False).eval()
        return generator, fake, losses

    def learning(self, pipe: Any) -> Learning:
        """See `Eraser.learning`."""
        rows = sum(1 + (scale != 1) for scale in self.guidance(pipe)[1:])
        return Learning(self.held(self.batch) * (1 + rows), "full", copies=2)

    def plan(self, pipe: Any) -> Plan:
        """Memory and time, from one timed pass of the network."""
        trained = 2 * sum(p.numel() for p in pipe.network.parameters())
        guided = [1 + (scale != 1) for scale in self.guidance(pipe)]
        passes = 2 * self.updates * self.batch * (1 + 3 + 3 * guided[0] + 3 * guided[1] + 3 * guided[2])
        title = f"SFD: {', '.join(self.concepts)}, {counted(self.updates, 'update')}"
        return make_plan(pipe, title, trained, passes)

    def guidance(self, pipe: Any) -> Guide3:
        """``cfg_scale``, or what it is by default."""
        if self.cfg_scale is not None:
            return self.cfg_scale
        return (4.5,) * 3 if isinstance(pipe, Text2Image) else (1.0,) * 3

    def judge(self, labels: Sequence[str]) -> Detector | None:
        """Who tells the classes."""
        return make_detector(self.detector, labels) if self.detector else None
