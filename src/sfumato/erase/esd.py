"""ESD: fine-tunes some of the network's weights to predict what negative guidance would (arXiv:2303.07345)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.text import counted

from .parts.finetune import ALL, ByGradient, Finetuning, StepLoss, make_plan
from .parts.visited import Latents, fresh, pooled

if TYPE_CHECKING:
    from sfumato.plan import Plan

Variant = Literal["x", "u", "full", "x-strict", "self"]
SUBSETS: dict[str, str] = {
    "x": "xattn", "u": "noxattn", "full": "full", "x-strict": "xattn-strict", "self": "selfattn",
}  # fmt: skip


def negative_guidance_target(
    e0: Float[Tensor, "batch *dims"],
    ec: Float[Tensor, "batch *dims"],
    eta: float,
    host: Float[Tensor, "batch *dims"] | None = None,
) -> Float[Tensor, "batch *dims"]:
    """e0 - eta (ec - e0): the prediction guided away from the concept (arXiv:2303.07345, eq. 6 and 7).

    With the prediction ``host`` of a prompt from which the concept is to be removed as an attribute:
    host - eta (ec - e0).

    The diffusers rewrite of the published code writes ec - eta' (ec - e0) without a host; eta' = eta + 1, so its
    default 2 is 1 here. With a host, its eta' is eta.

    The coefficients sum to one, so the same formula holds for every kind of prediction: at given (z, t) the kinds
    are affine functions of each other, and the target in v is the v of the target in eps. What changes with the
    kind is the weight of a squared error: alpha_t^2 |v - v'|^2 = |eps - eps'|^2 where alpha_t^2 + sigma_t^2 = 1.

    Args:
        e0: the frozen network's prediction for the empty prompt (or for the anchor).
        ec: its prediction for the concept.
        eta: strength, in the paper's convention: 0 is the empty prompt, -1 the concept itself.
    """
    return (e0 if host is None else host) - eta * (ec - e0)


@dataclass(frozen=True, kw_only=True)
class ESD(ByGradient):
    """Erased stable diffusion (arXiv:2303.07345): prompted with the concept, predict the negatively guided original.

    Each step draws a latent x_i that the model itself reaches after i steps towards the concept, i uniform in
    0..S-1, and moves the student's prediction there to `negative_guidance_target` of the frozen original's (eq. 7),
    in the network's own kind of prediction (see there what this means for v) and without guidance inside.
    Several concepts: one drawn at random for each picture of a batch.

    Cost: two networks, and about (S - 1) / 2 guided sampling steps, i.e. S - 1 network passes, per update: some
    90 % of the time. ``pool`` cuts that where the teacher samples.

    Differs from the paper: t is the time of x_i (the paper's code takes a latent two of the 50 steps less noisy
    than it tells the network); ``anchors`` replace the empty prompt in the target, and ``preserve`` adds
    ``preserve_weight`` times the squared distance to the original on such a prompt, neither of which the paper
    has. Without them it is the paper's loss. Other erasers withstand attacks better and harm neighbours less.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-4, 3e-4, 1e-3), "updates": (75, 150, 300)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "rewrite": {"updates": 200, "lr": 5e-5, "sampler": "teacher"},
        "sketch": {"updates": 150, "lr": 1e-3, "batch": 4, "sampling_steps": 20},
    }
    """Settings by name: the paper's (which are the defaults), those of the authors' rewrite for diffusers (whose
    "negative_guidance 2" is eta = 1 here; its esd-u leaves out the normalisation layers, and trains the time embedding
    and the output layer, as no ``variant`` does), and some for models as small as the embedded one."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"updates": 2, "sampling_steps": 3, "lr": 1e-3}

    variant: Variant = "x"
    """What is trained: cross-attention; all but cross-attention, time embedding and output; all; the
    cross-attention's keys and values; self-attention."""
    eta: float = 1.0
    """Strength of the negative guidance, in the paper's convention (see `negative_guidance_target`)."""
    erase_from: tuple[str, ...] = ()
    """Prompts from which the concepts are removed as attributes: none, one for all, or one per concept."""
    updates: Count = 1000
    lr: Positive = 1e-5
    """Learning rate of Adam."""
    batch: Count = 1
    """Latents in an update; they share the time."""
    checkpoint_every: Count = 50
    start_guidance: float = 3.0
    """Guidance under which the latents are sampled."""
    sampling_steps: Count = 50
    """S: DDIM steps of a whole trajectory."""
    sampler: Literal["student", "teacher"] = "student"
    """Who samples the latents: the network being trained (the paper), or the original (the diffusers rewrite)."""
    pool: Natural = 0
    """Sample that many whole trajectories beforehand and draw latents from them; 0 samples at every step."""
    preserve_weight: NotNegative = 1.0
    """Weight of the term for ``preserve``; without such prompts there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        hosts = (self.erase_from,) if isinstance(self.erase_from, str) else tuple(self.erase_from)
        object.__setattr__(self, "erase_from", hosts)
        if len(hosts) not in (0, 1, len(self.concepts)):
            raise BadInput(f"give no, one, or one erase_from per concept: got {len(hosts)} for {len(self.concepts)}")
        if self.pool and self.sampler == "student":
            raise BadInput("a pool of trajectories needs sampler='teacher': the student changes as it learns")

    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """A pipeline that shares all but the trained weights with ``pipe``, and the losses."""
        student = pipe.copy(own=SUBSETS[self.variant])
        adam = partial(torch.optim.Adam, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        loss = self.loss(pipe, student)
        recipe = Finetuning(f"esd-{self.variant}", self.concepts, pipe, student.network, loss, self.seed, adam)
        return student, {"losses": self.fit(recipe, None if folder is None else folder / "training")}

    def loss(self, teacher: Text2Image, student: Text2Image) -> StepLoss:
        """The loss of one step as a function of the step's generator. Prompts are encoded here, once."""
        hosts = self.erase_from * (len(self.concepts) if len(self.erase_from) == 1 else 1)
        concept, neutral = teacher.encode(self.concepts), teacher.encode(self._neutral())
        asked = teacher.encode(hosts) if hosts else concept
        kept = teacher.encode(self.preserve) if self.preserve else None
        latents = self._latents(teacher, student, asked)

        def loss_of(generator: torch.Generator, share: slice = ALL) -> Tensor:
            rows = torch.randint(len(concept), (self.batch,), generator=generator)
            z, t = latents(rows, generator, share)
            rows = rows[share]
            parts = [neutral[rows], concept[rows], *([asked[rows]] if hosts else [])]
            with torch.no_grad():
                e0, ec, *host = predict_each(teacher, z, t, parts)
                target = negative_guidance_target(e0, ec, self.eta, *host)
            loss = mse_loss(student.denoiser(z, t, asked[rows]), target)
            if kept is None:
                return loss
            some = kept[torch.randint(len(kept), (self.batch,), generator=generator)[share]]
            with torch.no_grad():
                original = teacher.denoiser(z, t, some)
            return loss + self.preserve_weight * mse_loss(student.denoiser(z, t, some), original)

        return loss_of

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Eraser.learning`."""
        return Learning(self.held(self.batch) * (1 + bool(self.preserve)), SUBSETS[self.variant])

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network."""
        trained = sum(p.numel() for p in pipe.parameters(SUBSETS[self.variant]).values())
        latents = self.updates * self.batch
        guided_steps = self.pool * self.sampling_steps if self.pool else latents * (self.sampling_steps - 1) / 2
        passes = 2 * guided_steps + latents * (5 + bool(self.erase_from) + 4 * bool(self.preserve))
        title = f"ESD-{self.variant}: {', '.join(self.concepts)}, {counted(self.updates, 'update')}"
        return make_plan(pipe, title, trained, passes)

    def _neutral(self) -> list[str]:
        return [self.anchor_for(i, "") for i in range(len(self.concepts))]

    def _latents(self, teacher: Text2Image, student: Text2Image, asked: Conditioning) -> Latents:
        guidance = {"cfg_scale": self.start_guidance, "negative": teacher.unconditional()}
        if self.pool:
            return pooled(teacher, asked, self.pool, self.seed, self.sampling_steps, **guidance)
        source = teacher if self.sampler == "teacher" else student
        return fresh(source, asked, self.sampling_steps, **guidance)


@dataclass(frozen=True, kw_only=True)
class ESDx(ESD):
    """ESD-x (arXiv:2303.07345): trains the cross-attention, so it erases where the prompt names the concept.

    For styles and named things. Everything else as in `ESD`.
    """

    variant: Variant = field(default="x", init=False)


@dataclass(frozen=True, kw_only=True)
class ESDu(ESD):
    """ESD-u (arXiv:2303.07345): trains all but the cross-attention, so it erases whatever the prompt says.

    For concepts that show up unasked; changes every picture a little. Everything else as in `ESD`.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (3e-5, 1e-4, 3e-4), "updates": (75, 150, 300)}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **ESD.presets,
        "sketch": {"updates": 75, "lr": 1e-4, "batch": 4, "sampling_steps": 20},
    }

    variant: Variant = field(default="u", init=False)


def predict_each(
    pipe: Text2Image, z: Float[Tensor, "batch *dims"], t: Float[Tensor, "batch"] | float, conds: list[Conditioning]
) -> tuple[Float[Tensor, "batch *dims"], ...]:
    """The network's prediction for ``z`` under each conditioning, in one pass."""
    t = t.repeat(len(conds)) if torch.is_tensor(t) else t
    return pipe.denoiser(z.repeat(len(conds), 1, 1, 1), t, Conditioning.cat(conds)).chunk(len(conds))
