"""Surgical erasing: what guidance adds for the concept changes, the unconditional score stays (arXiv:2312.12807)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from sfumato.fields import Count, Natural, NotNegative, Positive
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.text import counted

from .esd import predict_each
from .parts.finetune import ALL, ByGradient, Finetuning, StepLoss, make_plan
from .parts.purify import Purified, purify
from .parts.trained import Trained, size_of, student_of
from .parts.visited import Latents, fresh, noised, pooled
from .parts.words import check_templates

if TYPE_CHECKING:
    from sfumato.plan import Plan

__all__ = ["Purified", "Surgical", "guidance_target", "purify", "surgical_loss"]


def guidance_target(
    null: Float[Tensor, "batch *dims"],
    anchor: Float[Tensor, "batch *dims"],
    concept: Float[Tensor, "batch *dims"] | None = None,
    strength: float = 1.0,
) -> Float[Tensor, "batch *dims"]:
    """kappa (anchor - null) + (1 - kappa) (concept - null): the guidance that the concept is to have.

    Args:
        null, anchor, concept: the frozen network's predictions for the empty prompt, the alternative and the concept.
        strength: kappa; 1 is the alternative's guidance, for which the concept's prediction is not needed; 0 the
            concept's own; above 1 pushes away from the concept, as ESD does.
    """
    if concept is None:
        if strength != 1:
            raise ValueError(f"a strength of {strength} needs the prediction for the concept")
        return anchor - null
    return strength * (anchor - null) + (1 - strength) * (concept - null)


def surgical_loss(
    concept: Float[Tensor, "batch *dims"],
    null: Float[Tensor, "batch *dims"],
    target: Float[Tensor, "batch *dims"],
    original: Float[Tensor, "batch *dims"],
    null_weight: float = 1.0,
    stop_gradient: bool = True,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(|concept - sg(null) - target|^2, null_weight |null - original|^2), means over all elements; the loss is the sum.

    Args:
        concept, null: the trained network's predictions for the concept and for the empty prompt.
        target: `guidance_target`.
        original: the frozen network's prediction for the empty prompt.
        stop_gradient: the first term reaches the conditional prediction alone, so that it cannot be satisfied by moving
            the unconditional one.
    """
    base = null.detach() if stop_gradient else null
    return mse_loss(concept - base, target), null_weight * mse_loss(null, original)


@dataclass(frozen=True, kw_only=True)
class Surgical(ByGradient):
    """Surgical concept erasing (arXiv:2312.12807): the concept's guidance becomes that of an alternative, or none.

    Guided sampling uses eps(null) + s (eps(c) - eps(null)). Training moves the bracket for the concept to the frozen
    model's bracket for ``anchors`` (default: the empty prompt, so to zero) and holds eps(null) where it was, on latents
    that the frozen model visits when asked for the concept. So what is drawn without the concept, and the layout of
    what is drawn with it, should stay. Synonyms are erased as further ``concepts`` with the same anchor. Several
    concepts: the sum of their terms, with one term for the empty prompt. `purify` takes the concept out of a picture.

    The paper's goal, its two terms and its uses are confirmed from abstract and first figure; formulas, where the
    latents come from and all defaults are reconstructed, and can be set. In the network's own kind of prediction: at
    given (z, t) brackets of different kinds are multiples of each other, which changes the weight of the error only.

    ``null_drift`` in the record says how well eps(null) was held; the goal is below 0.01. The optimum of both terms has
    none, so what is left is the way there: concept and empty prompt share weights, the first term moves both at once,
    and the second, whose gradient is zero at the start, pulls back only what has moved. What is drawn for each update
    keeps Adam at a constant rate away from the optimum, the further the higher the rate: short runs at high rates stay
    well above the goal, also with the preset "sketch", whose rate falls for this reason. The figure is relative to the
    concept's guidance half-way, which is small where the picture is decided by then. Less of it: ``decay="cosine"``, a
    lower ``lr`` with more ``updates``, then a higher ``null_weight``, which also slows the erasure down.

    Cost: two networks; per update and concept (S - 1) / 2 guided sampling steps of the frozen one on average, i.e.
    S - 1 network passes, unless there is a ``pool``; then 2 or 3 passes of it, and 2 of the trained one forward and
    backward.

    Differs from the paper: as far as it is known, nothing; ``preserve`` (with ``preserve_weight``) adds the squared
    distance to the original on other prompts, which is not part of it as far as is known.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {
        "lr": (1e-4, 3e-4, 1e-3), "null_weight": (1.0, 10.0), "updates": (120, 240),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "sketch": {
            "updates": 240, "lr": 1e-3, "decay": "cosine", "null_weight": 10.0, "batch": 4, "pool": 16,
            "sampling_steps": 20, "start_guidance": 3.0,
            "templates": ("{concept}", "a {concept}", "a picture of a {concept}"),
        },
    }  # fmt: skip
    """Settings by name: those reconstructed for the paper (which are the defaults), and some for models as small as the
    embedded one."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"updates": 2, "sampling_steps": 2, "lr": 1e-3, "anchors": "square"}

    trained: Trained = "xattn"
    """What is trained: cross-attention (text side of joint attention), its keys and values, self-attention, all but
    cross-attention, time embedding and output, all; or a low-rank adapter ("lora") beside the frozen weights."""
    rank: Count = 8
    """Rank of the adapter."""
    null_weight: NotNegative = 1.0
    """lambda: weight of the term that holds the unconditional prediction."""
    stop_gradient: bool = True
    """The guidance term moves the conditional prediction alone."""
    strength: float = 1.0
    """kappa: see `guidance_target`; 0 changes nothing, above 1 pushes away from the concept."""
    preserve_weight: NotNegative = 1.0
    """Weight of the term for ``preserve``; without such prompts there is none."""
    updates: Count = 1000
    lr: Positive = 1e-5
    """Learning rate of AdamW."""
    weight_decay: NotNegative = 0.01
    batch: Count = 1
    """Latents of each concept in an update; they share the time."""
    checkpoint_every: Count = 50
    templates: tuple[str, ...] = ("{concept}", "a photo of {concept}", "an image of {concept}")
    """How prompts name a concept, one drawn for each update; {concept} stands for it, and for its alternative."""
    latents: Literal["visited", "noised"] = "visited"
    """Where the frozen model is compared: at what it visits towards the concept, after a random number of steps; or at
    pictures of the concept that it has drawn, noised to a random time."""
    start_guidance: float = 7.5
    """Guidance under which these are sampled."""
    sampling_steps: Count = 50
    """S: DDIM steps of a whole trajectory."""
    pool: Natural = 0
    """Sample that many whole trajectories (or pictures) beforehand, at least one a concept and template, and draw from
    them; 0 samples for every update anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "templates", check_templates(self.templates))

    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """A pipeline that shares all but what is trained with ``pipe``; the losses, and ``null_drift``: how far the
        unconditional prediction has moved, as a share of the length of the concept's guidance (want: below 0.01)."""
        student, module = student_of(pipe, self.trained, "surgical", self.rank, self.seed)
        adamw = partial(torch.optim.AdamW, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        loss = self.loss(pipe, student)
        recipe = Finetuning("surgical", self.concepts, pipe, module, loss, self.seed, adamw)
        losses = self.fit(recipe, None if folder is None else folder / "training")
        return student, {"losses": losses, "null_drift": self.null_drift(pipe, student)}

    def loss(self, teacher: Text2Image, student: Text2Image) -> StepLoss:
        """The loss of one step as a function of the step's generator. Prompts are encoded here, once."""
        k, T = len(self.concepts), len(self.templates)
        named = [t.replace("{concept}", c) for c in self.concepts for t in self.templates]
        # An alternative is named as the concept is; none is the empty prompt, bare.
        instead = [self.anchor_for(i, "") for i in range(k)]
        replaced = [t.replace("{concept}", a) if a.strip() else "" for a in instead for t in self.templates]
        concept, null = teacher.encode(named), teacher.unconditional()
        # Not the encoded "", which on SDXL is another one: no alternative means no guidance.
        anchor = teacher.encode(replaced).drop(torch.tensor([not text for text in replaced]), null)
        kept = teacher.encode(self.preserve) if self.preserve else None
        latents = self._latents(teacher, concept)

        def loss_of(generator: torch.Generator, share: slice = ALL) -> Tensor:
            template = torch.randint(T, (self.batch, k), generator=generator)
            rows = (torch.arange(k) * T + template).flatten()  # those of one latent number side by side
            mine = slice(*(None if i is None else i * k for i in (share.start, share.stop)))
            z, t = latents(rows, generator, mine)
            others = torch.randint(len(kept or (0,)), rows.shape, generator=generator)[mine]
            rows, empty = rows[mine], null.repeat(len(z))
            own = [concept[rows]] if self.strength != 1 else []
            some = [] if kept is None else [kept[others]]
            with torch.no_grad():
                e0, ea, *rest = predict_each(teacher, z, t, [empty, anchor[rows], *own, *some])
                target = guidance_target(e0, ea, rest[0] if own else None, self.strength)
            n, c, *moved = predict_each(student, z, t, [empty, concept[rows], *some])
            guidance, drift = surgical_loss(c, n, target, e0, self.null_weight, self.stop_gradient)
            kept_loss = self.preserve_weight * mse_loss(moved[0], rest[-1]) if some else 0.0
            return k * guidance + drift + kept_loss  # the sum over the concepts, of means

        return loss_of

    @torch.no_grad()
    def null_drift(self, teacher: Text2Image, student: Text2Image) -> float:
        """|eps_th(null) - eps_0(null)| / |eps_0(concept) - eps_0(null)| half-way to each concept."""
        asked, k = teacher.encode(self.concepts), len(self.concepts)
        guidance = {"cfg_scale": self.start_guidance, "negative": teacher.unconditional()}
        steps = {"sampling_steps": self.sampling_steps, "stop_after": self.sampling_steps // 2}
        z, t = teacher.trajectory(asked, list(range(k)), **steps, **guidance)
        null = teacher.unconditional(k)
        e0, ec, moved = (p.denoiser(z, t, c).double() for p, c in ((teacher, null), (teacher, asked), (student, null)))
        return float((moved - e0).norm() / (ec - e0).norm().clamp(min=1e-12))

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Eraser.learning`."""
        rows = self.held(self.batch) * len(self.concepts) * (2 + bool(self.preserve))
        return Learning(rows, self.trained, self.rank)

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network."""
        k, S = len(self.concepts), self.sampling_steps
        latents = self.updates * self.batch * k
        each = S if self.latents == "noised" else (S - 1) / 2
        guided_steps = max(self.pool, k * len(self.templates)) * S if self.pool else latents * each
        passes = 2 * guided_steps + latents * (2 + (self.strength != 1) + 3 * 2 + 4 * bool(self.preserve))
        title = f"Surgical: {', '.join(self.concepts)}, {counted(self.updates, 'update')}"
        return make_plan(pipe, title, size_of(pipe, self.trained, self.rank), passes)

    def _latents(self, teacher: Text2Image, asked: Conditioning) -> Latents:
        S, guidance = self.sampling_steps, {"cfg_scale": self.start_guidance, "negative": teacher.unconditional()}
        if self.latents == "noised":
            return noised(teacher, asked, self.pool, self.seed, S, **guidance)
        if self.pool:
            return pooled(teacher, asked, self.pool, self.seed, S, **guidance)
        return fresh(teacher, asked, S, **guidance)
