"""Unlearning that keeps the model's integrity: forget by a target, retain by self-distillation (arXiv:2411.02068)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from sfumato.data.cases import names, say
from sfumato.errors import BadInput
from sfumato.fields import Bound, Count, NotNegative, Positive, Share, below
from sfumato.metrics.detectors import detector_for
from sfumato.noise.process import compose
from sfumato.pipeline import Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.text import counted

from .esd import negative_guidance_target, predict_each
from .parts.finetune import ALL, ByGradient, StepLoss, make_plan, seeds
from .parts.trained import Trained, size_of, student_of
from .parts.unlearning import Balance, Shown, Unlearning, drawn, encode_each, out_of, projected, saliency_mask
from .parts.words import check_templates, nothing_where_empty

if TYPE_CHECKING:
    from sfumato.plan import Plan

__all__ = ["Integrity", "bounded_ascent", "negative_guidance_target", "projected", "saliency_mask"]


def bounded_ascent(
    eps: Float[Tensor, "batch *dims"], noise: Float[Tensor, "batch *dims"], margin: float
) -> Float[Tensor, ""]:
    """- mean over the pictures of min(|eps - noise|^2, margin), the square a mean over a picture's elements.

    Args:
        eps: the trained network's prediction of the noise in pictures that are to be forgotten.
        noise: what was added.
        margin: from this error on a picture has no gradient.
    """
    return -(eps - noise).square().flatten(1).mean(1).clamp(max=margin).mean()


@dataclass(frozen=True, kw_only=True)
class Integrity(ByGradient):
    """Unlearning by a surrogate, with self-distillation for all else (arXiv:2411.02068), so that it stays the same.

    Minimises L_F + lambda L_R. L_R = |eps_th(x_t, y_r) - eps_0(x_t, y_r)|^2 on noised pictures of other prompts has its
    minimum at the original function itself, whereas the usual denoising loss (``retain`` "denoise", a baseline) lets
    pictures move as long as they stay good ones. L_F is one of: "overwrite", |eps_th(x_t, y_f) - eps_0(x_t, y_s)|^2
    with the surrogate y_s (``anchors``, the empty prompt, or a retained prompt at random); "negative", the same with
    the negatively guided original (`negative_guidance_target`); "ascent", - min(|eps_th(x_t, y_f) - eps|^2, margin).
    Errors are in the network's own kind of prediction, but for "ascent", whose margin is one of noise.

    Purpose, setting and the measure in words are confirmed from the abstract; formulas, variants and defaults are
    reconstructed, and can be set. The measure itself is part of every audit (`sfumato.audit.integrity`).

    Cost: two networks; ``pool`` pictures for each side, drawn beforehand unless ``data`` has them; per update and
    picture 2 passes of the original network (3 with "negative", 1 with "ascent") and 2 of the trained one forward and
    backward.

    Differs from the paper: as far as it is known, ``empty_share`` (an unconditional prediction that moves is felt in
    every guided picture) and the alternation's two optimisers, whose rate does not depend on ``retain_weight``.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {
        "lr": (1e-4, 3e-4, 1e-3), "updates": (75, 150, 300), "retain_weight": (0.3, 1.0, 3.0),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "lora": {"trained": "lora", "lr": 1e-4},
        "sketch": {
            "updates": 150, "lr": 3e-4, "batch": 8, "trained": "xattn", "data": "sketch", "pool": 128,
            "sampling_steps": 20, "start_guidance": 3.0, "templates": ("{concept}", "a {concept}"),
        },
    }  # fmt: skip
    """Settings by name: those reconstructed for the paper (which are the defaults), for an adapter, and some for models
    as small as the embedded one."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "updates": 2, "batch": 2, "lr": 1e-3, "pool": 3, "sampling_steps": 2, "preserve": ("red square", "art"),
    }  # fmt: skip
    keeps_world: ClassVar[bool] = True

    forget: Literal["overwrite", "negative", "ascent"] = "overwrite"
    """What pictures of the concepts are trained towards."""
    surrogate: Literal["anchor", "random"] = "anchor"
    """y_s: the prompt with the concept's anchor in its place (without one, the empty prompt), or a retained prompt at
    random (random labels)."""
    eta: float = 1.0
    """Strength of the negative guidance, for "negative"."""
    margin: Positive = 1.0
    """Largest error that counts, for "ascent"; predicting no noise at all has the error 1."""
    retain: Literal["distill", "denoise"] = "distill"
    """What is trained on all else: to predict what the original does, or the noise."""
    retain_weight: NotNegative = 1.0
    """lambda: weight of that term."""
    empty_share: Share = 0.1
    """Share of the retained pictures that are shown with the empty prompt."""
    balance: Balance = "sum"
    """One update by both terms; the same without what opposes the second in the first's gradient ("project"); or even
    updates by the first and odd ones by the second ("alternate")."""
    trained: Trained = "full"
    """What is trained: cross-attention (text side of joint attention), its keys and values, self-attention, all but
    cross-attention, time embedding and output, all; or a low-rank adapter ("lora") beside the frozen weights."""
    rank: Count = 8
    """Rank of the adapter."""
    saliency: Annotated[float, Bound(0, 1, open_low=True)] = 1.0
    """Share of these weights that may change: those with the largest gradient of L_F at the start; 1: all."""
    updates: Count = 1000
    lr: Positive = 1e-5
    """Learning rate of AdamW."""
    batch: Count = 8
    """Pictures of each side in an update."""
    data: str = ""
    """Pictures with captions, as for `sfumato train`: those that name a concept are to be forgotten, the others to be
    retained. What is missing (without ``data`` both), and what ``preserve`` names, the original draws."""
    pool: Count = 256
    """Pictures of each side."""
    templates: tuple[str, ...] = ("{concept}", "a photo of {concept}", "a picture of {concept}")
    """How prompts of drawn pictures name a concept."""
    start_guidance: float = 7.5
    """Guidance under which they are drawn."""
    sampling_steps: Count = 50
    """DDIM steps of a picture."""
    stop_at: Annotated[float, below(0, 1)] | None = None
    """Stop as soon as no concept is seen in more than this share of its pictures: integrity falls with every update."""
    detector: str | None = None
    """Who sees them, as for `sfumato audit`; by default the oracles for models of the sketch world."""
    check_every: Count = 25
    """Updates between looks."""
    check_pictures: Count = 32
    """Pictures of each concept that are looked at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "templates", check_templates(self.templates))
        if self.anchors and (self.surrogate == "random" or self.forget != "overwrite"):
            raise BadInput("anchors go with forget='overwrite' and surrogate='anchor': leave them out, or choose these")

    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """A pipeline that shares all but what is trained with ``pipe``; the losses, and at which update it ended."""
        student, module = student_of(pipe, self.trained, "integrity", self.rank, self.seed)
        adamw = partial(torch.optim.AdamW, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        enough = None if self.stop_at is None else self.goal(pipe, student)
        forget, retain = self.losses(pipe, student)
        recipe = Unlearning(
            self.concepts, pipe, module, forget, retain, self.seed, adamw, self.retain_weight, self.balance, enough,
            self.check_every,
        )  # fmt: skip
        if self.saliency < 1:
            recipe.keep_to(self.saliency, -(-self.pool // self.batch), decays=self.weight_decay > 0)
        history = self.course(recipe, pipe, None if folder is None else folder / "training")
        ended = sum(map(len, history.values()))
        return student, {"losses": history.get("loss", history), "ended_after": ended}

    def shown(self, pipe: Text2Image) -> tuple[Shown, Shown]:
        """What is to be forgotten and what is to be retained."""
        forget, retain = out_of(pipe, self.data, self.concepts, self.pool, self.seed) if self.data else (None, None)
        guidance = {"cfg_scale": self.start_guidance, "negative": pipe.unconditional()}
        draw = partial(drawn, pipe, n=self.pool, sampling_steps=self.sampling_steps, **guidance)
        missing = [c for c in self.concepts if forget is None or not any(names(p, c) for p in forget.prompts)]
        if missing:
            own = draw([t.replace("{concept}", c) for t in self.templates for c in missing], seed=self.seed)
            forget = own if forget is None else forget.and_also(own)
        if retain is None or self.preserve:
            own = draw(self.kept(pipe) or [""], seed=self.seed + 1)
            retain = own if retain is None else retain.and_also(own)
        assert forget is not None  # one of the two has every concept
        return forget, retain

    def losses(self, teacher: Text2Image, student: Text2Image) -> tuple[StepLoss, StepLoss]:
        """L_F and L_R of one step as functions of the step's generator. Pictures are drawn or read here, once."""
        forget, retain = self.shown(teacher)
        process, kind, null = teacher.denoiser.process, teacher.denoiser.prediction, teacher.unconditional()
        concept, other = encode_each(teacher, forget.prompts), encode_each(teacher, retain.prompts)
        instead = nothing_where_empty(encode_each(teacher, [self.instead_of(p) for p in forget.prompts]), null)

        def forgetting(generator: torch.Generator, share: slice = ALL) -> Tensor:
            rows, _, eps, t, z = forget.noised(teacher, self.batch, generator, share)
            label = torch.randint(len(other), (self.batch,), generator=generator)[share]
            pred = student.denoiser(z, t, concept[rows])
            if self.forget == "ascent":
                return bounded_ascent(process.convert(pred, z, t.to(z.device), kind, "eps"), eps, self.margin)
            with torch.no_grad():
                if self.forget == "negative":
                    e0, ec = predict_each(teacher, z, t, [null.repeat(len(z)), concept[rows]])
                    target = negative_guidance_target(e0, ec, self.eta)
                else:
                    target = teacher.denoiser(z, t, other[label] if self.surrogate == "random" else instead[rows])
            return mse_loss(pred, target)

        def retaining(generator: torch.Generator, share: slice = ALL) -> Tensor:
            rows, x, eps, t, z = retain.noised(teacher, self.batch, generator, share)
            bare = torch.rand(self.batch, generator=generator)[share] < self.empty_share
            said = other[rows].drop(bare, null)
            if self.retain == "denoise":
                target = compose(x, eps, *process.alpha_sigma(t.to(x.device), x), kind)
            else:
                with torch.no_grad():
                    target = teacher.denoiser(z, t, said)
            return mse_loss(student.denoiser(z, t, said), target)

        return forgetting, retaining

    def instead_of(self, prompt: str) -> str:
        """The surrogate of a prompt: anchors in place of the concepts; nothing, where one that it names has none."""
        anchors = [self.anchor_for(i, "").strip() for i in range(len(self.concepts))]
        for i, (concept, anchor) in enumerate(zip(self.concepts, anchors, strict=True)):
            if not anchor and names(prompt, concept):
                return ""
            prompt = say(prompt, concept, f"\0{i}\0")
        # Only now, for an anchor may be another concept, which is not meant where it stands for one.
        for i, anchor in enumerate(anchors):
            prompt = say(prompt, f"\0{i}\0", anchor)
        return prompt

    def goal(self, pipe: Text2Image, student: Text2Image) -> Callable[[], bool]:
        """A function that says whether every concept is gone from enough of its pictures."""
        judge = detector_for(pipe.vocabulary, self.detector, self.concepts)
        n, stop_at = self.check_pictures, self.stop_at or 0.0
        starts = seeds(n, torch.Generator().manual_seed(self.seed))

        def enough() -> bool:
            for concept in self.concepts:
                asked = [self.templates[i % len(self.templates)].replace("{concept}", concept) for i in range(n)]
                pictures = student.draw(asked, starts, sampling_steps=self.sampling_steps)
                if judge(pictures, concept).present.double().mean() > stop_at:
                    return False
            return True

        return enough

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Eraser.learning`."""
        gradients = 1 if self.balance == "alternate" else 2
        return Learning(self.held(self.batch), self.trained, self.rank, gradients=gradients)

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network."""
        pictures = self.updates * self.batch
        teacher = {"overwrite": 1, "negative": 2, "ascent": 0}[self.forget] + (self.retain == "distill")
        looks = 0 if self.stop_at is None else self.updates // self.check_every * self.check_pictures
        drawn = 2 * (0 if self.data else 2 * self.pool) * self.sampling_steps
        passes = pictures * (teacher + 3 * 2) + drawn + 2 * looks * len(self.concepts) * self.sampling_steps
        title = f"Integrity: {', '.join(self.concepts)}, {counted(self.updates, 'update')}"
        return make_plan(pipe, title, size_of(pipe, self.trained, self.rank), passes)
