"""Moment matching (arXiv:2406.04103): a few-step student whose steps draw, as good as a many-step teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, within
from sfumato.pipeline import few_steps
from sfumato.plan import Plan
from sfumato.sample import ddpm, predict
from sfumato.sample.times import uniform
from sfumato.train.draw import integers, normal
from sfumato.train.draw import uniform as uniformly
from sfumato.train.recipe import Gradients, Recipe, Turn

from .base import Distiller, Model, guidance, guided, pure
from .parts.data import CleanData, FromPictures
from .parts.instant import Gradient
from .parts.moments import (
    Weight,
    auxiliary_loss,
    draw_pair_of_times,
    instant_loss,
    loss_weight,
    next_state,
    student_loss,
    teacher_loss,
)


@dataclass(frozen=True, kw_only=True)
class MomentMatching(FromPictures, Distiller):
    """Multistep moment matching: along the student's own way the mean of what it predicts is what the teacher predicts.

    From noised data z_t the student predicts x~, and z_s ~ q(z_s | z_t, x~) is where its sampler would go, at most
    1 / ``sampling_steps`` lower. Wanted is E[x~ | z_s] = g_theta(z_s), the teacher's prediction, for every z_s.
    "alternating" (algorithm 2): an auxiliary model learns the mean of x~ given z_s, held half-way to the teacher, and
    the student goes against the difference of the two, by turns. "instant" (algorithm 3): in place of the auxiliary,
    one small scaled step of the teacher itself on what the student makes: its gradient nu from one batch, and, on
    another, by how much the prediction would change along nu (a forward-mode derivative). No gradient flows through
    z_s. The student has the teacher's network, and samples in ``sampling_steps`` ancestral steps; with one step this is
    variational score distillation (Diff-Instruct). A guided teacher is distilled together with its guidance.

    An update is a round: one turn of the auxiliary (or of nu), then one of the student, each with a batch of its own.
    Cost of a round: two student forwards, one backward; alternating: also the teacher twice and the auxiliary twice
    forward, once backward, and a third network with its optimiser; instant: the teacher forward, backward, and a
    forward-mode pass (about two forwards) with its tangents.

    Differs from the paper: nothing that is known. Not confirmed (there is no official code): learning rate and its
    course, clipping, w(s), the scaling Lam of the instant variant (here Adam's), that the auxiliary is not guided,
    dropout (none here), averaged weights. ``rollout`` comes from later work of the same group.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Not from the paper: its shape at a hundredth of its length, at a higher rate; not tuned.
        "sketch": {
            "updates": 2000, "batch": 32, "lr": 2e-5, "warmup": 100, "ema": 0.995, "pictures": 8000,
            "checkpoint_every": 250,
        },
    }  # fmt: skip

    variant: Literal["alternating", "instant"] = "alternating"
    """With an auxiliary model, or with the teacher's own gradient."""
    sampling_steps: Count = 8
    """Steps in which the student will sample: 1, 2, 4, 8 in the paper."""
    lr: Positive = 2e-6
    warmup: Natural = 1000
    decay: Literal["cosine", "linear", "constant"] = "linear"
    final_lr: NotNegative = 0.0
    betas: tuple[Decay, Decay] = (0.0, 0.99)
    """Adam's decays, in both turns; the first is 0, lest the two chase each other's momentum."""
    eps: NotNegative = 1e-12
    """Adam's constant in the denominator."""
    weight: Weight = "v"
    """w(s): the weight of an error of v (SNR + 1), of eps (SNR), EDM's, or 1."""
    smallest_time: Annotated[float, within(0, 0.5)] = 1e-3
    """s is at least this, for w(s) grows without bound towards the clean end."""
    rollout: bool = False
    """Start from states of the student's own sampler instead of noised data."""
    cfg_scale: float | None = None
    """Guidance of the teacher that goes into the student; 1 is none, by default the teacher's own."""

    passes: ClassVar[float] = 12.0

    def plan(self) -> Plan:
        plan = super().plan()
        weights = plan.memory["gradients"]
        if self.variant == "alternating":
            more = {"auxiliary": weights, "its optimiser": 2 * weights}
        else:
            more = {"squares of the teacher's gradient, and nu": 2 * weights}
        return replace(plan, memory={**plan.memory, **more})

    def recipe(self, teacher: Model, student: Model, folder: Path, progress: bool = False) -> MomentTraining:
        data = self.open_data(teacher, folder, self.seed, progress)
        # The instant variant needs the teacher's gradient, not another network: its weights are shared, never changed.
        auxiliary = teacher.copy(own="full") if self.variant == "alternating" else teacher.copy()
        return MomentTraining(self, teacher, student, auxiliary, data)

    def finish(self, student: Model) -> None:
        few_steps(student, self.sampling_steps, ancestral=True)


class MomentTraining(Recipe):
    """`MomentMatching` as the loop sees it.

    ``teacher``, ``student`` and ``auxiliary`` need a ``denoiser``, the last two a ``network``, the teacher also
    ``unconditional(n)`` and ``defaults["cfg_scale"]``. In the instant variant the auxiliary is the teacher itself, over
    the same weights.
    """

    name = "moment-matching"

    def __init__(self, method: MomentMatching, teacher: Any, student: Any, auxiliary: Any, data: CleanData):
        self.method, self.teacher, self.student, self.auxiliary, self.data = method, teacher, student, auxiliary, data
        self.scale = guidance(teacher, method.cfg_scale)
        auxiliary.network.requires_grad_(True)
        self.instant = method.variant == "instant"
        if self.instant:
            self.gradient = Gradient(auxiliary)

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student.network, "auxiliary": self.auxiliary.network}

    def copies(self) -> dict[str, nn.Module]:
        return {"gradient": self.gradient.squares} if self.instant else {}

    def turns(self) -> Sequence[Turn]:
        if self.instant:  # at the rate 0 nothing is updated: this turn is for its gradients
            still: dict[str, Any] = {"optimizer": torch.optim.SGD, "lr": 0.0, "clip_norm": 0.0}
            first = Turn(name="gradient", loss=self.first_loss, trains=["auxiliary"], ema=0, fresh=True, **still)
        else:
            first = Turn(name="auxiliary", loss=self.first_loss, trains=["auxiliary"], ema=0, fresh=True)
        return [first, Turn(name="student", loss=self.loss, trains=["student"], fresh=True)]

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        return self.data.batch(rng, size)

    def first_loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the auxiliary, or, in the instant variant, of the teacher on what the student makes."""
        with torch.no_grad():
            x, z, s, cond = self.joint(batch, rng)
        weight = loss_weight(self.student.denoiser.process, s, self.method.weight).to(x)
        if self.instant:
            return teacher_loss(x, self.taught(self.auxiliary, z, s, cond), weight).mean(), {}
        auxiliary = predict(self.auxiliary.denoiser, z, s, cond)
        with torch.no_grad():
            teacher = self.taught(self.teacher, z, s, cond)
        return auxiliary_loss(x, auxiliary, teacher, weight).mean(), {}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the student."""
        x, z, s, cond = self.joint(batch, rng)
        weight = loss_weight(self.student.denoiser.process, s, self.method.weight).to(x)
        if self.instant:
            change = self.gradient.change(lambda: self.taught(self.auxiliary, z, s, cond))
            return instant_loss(x, change, weight).mean(), {"gap": change.square().mean().sqrt()}
        with torch.no_grad():
            auxiliary, teacher = predict(self.auxiliary.denoiser, z, s, cond), self.taught(self.teacher, z, s, cond)
        gap = (auxiliary - teacher).square().mean().sqrt()
        return student_loss(x, auxiliary, teacher, weight).mean(), {"gap": gap}

    def gradients(self, turn: Turn, gradients: Gradients) -> Gradients:
        if turn.name == "gradient":
            self.gradient.take(gradients, self.method.betas[1], self.method.eps)
        return gradients

    def joint(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Any]:
        """The student's x~, a z_s that follows from it, s, and what they were told; in float64 where there is."""
        method, denoiser = self.method, self.student.denoiser
        device = next(self.student.network.parameters()).device
        wide = torch.float32 if device.type == "mps" else torch.float64
        cond = self.data.conditioning(batch["rows"], batch["bare"])
        x, n = batch["x"].to(device, wide), len(batch["x"])
        first, second = (normal(x.shape, rng).to(x) for _ in range(2))
        if method.rollout:
            z, t = self.rolled(first, cond, rng)
            s = (t - uniformly(n, rng).to(t) / method.sampling_steps).clamp_min(method.smallest_time)
        else:
            drawn = draw_pair_of_times(n, method.sampling_steps, rng, method.smallest_time)
            t, s = (times.to(x) for times in drawn)
            z = denoiser.process.diffuse(x, t, first)
        guess = predict(denoiser, z, t, cond)
        return guess, self.follow(z, guess, t, s, second), s, cond

    def follow(self, z: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """z_s, where the student's sampler goes from z_t with x0."""
        return next_state(self.student.denoiser.process, z, x0, t, s, noise)

    @torch.no_grad()
    def rolled(self, noise: Float[Tensor, "n *dims"], cond: Any, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(z_t, t): for each row the student's sampler after 0 to ``sampling_steps`` - 1 steps."""
        steps, denoiser = self.method.sampling_steps, self.student.denoiser
        taken = integers(steps, len(noise), rng).to(noise.device)
        z = pure(denoiser.process, noise)
        for i in range(steps - 1):
            mean, var = denoiser.process.posterior(z, predict(denoiser, z, 1 - i / steps, cond), 1 - i / steps,
                                                   1 - (i + 1) / steps)  # fmt: skip
            after = denoiser.process.sample(mean, var, normal(z.shape, rng).to(z))
            z = torch.where((taken > i).reshape(-1, *[1] * (z.ndim - 1)), after, z)
        return z, 1 - taken.to(noise) / steps

    def taught(self, model: Any, z: Tensor, t: Tensor, cond: Any) -> Tensor:
        """A teacher's x0, with its guidance."""
        return predict(guided(self.teacher, model.denoiser, cond, self.scale, len(z)), z, t, cond)

    @torch.no_grad()
    def grid(self, rng: torch.Generator, n: int = 16) -> Tensor:
        """Pictures of the student, for captions or classes of the data."""
        rows = torch.randint(len(self.data.pictures), (n,), generator=rng)
        cond = self.data.conditioning(rows, torch.zeros(n, dtype=torch.bool))
        z = torch.randn(n, *self.student.latent_shape(), generator=rng).to(self.student.device)
        z, times = pure(self.student.denoiser.process, z), uniform(self.method.sampling_steps)
        made = ddpm(self.student.denoiser, z, times, cond, generator=rng, final_noise=False)
        return (self.student.decode_latents(made) + 1).clamp(0, 2) / 2
