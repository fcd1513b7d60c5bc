"""Multistep consistency models (arXiv:2403.06807): from many diffusion steps to a few, as many as you ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.fields import Decay, Natural, NotNegative, Positive, at_least
from sfumato.noise.addim import addim_step
from sfumato.sample import Guided, predict
from sfumato.train.draw import normal, same_dropout
from sfumato.train.recipe import Recipe

from .base import Distiller, Model, guidance, guided, sampled
from .parts.data import CleanData, FromPictures
from .parts.segments import Per, consistency_target, draw_times, pseudo_huber, ramp, teacher_steps, v_weight


@dataclass(frozen=True, kw_only=True)
class MultistepCM(FromPictures, Distiller):
    """Multistep consistency distillation and training: one network, a consistency model inside each of S segments.

    Time is cut into ``sampling_steps`` = S equal segments. The network learns that all points of one ODE trajectory
    inside a segment predict, by one DDIM step (eq. 4, 5), the same start of the segment: the loss compares the
    prediction at t with the network's own at s = t - 1 / T, without gradient, where (z_s, s) is one step of aDDIM
    (algorithm 3) from (z_t, t) with the teacher's prediction ("cd") or the clean picture itself ("ct"). S = 1 is a
    consistency model, large S a diffusion model. T grows from ``first_teacher_steps`` to ``last_teacher_steps``. The
    student has the teacher's network and inputs, and samples in S plain DDIM steps. A guided teacher is distilled
    together with its guidance; the variance for aDDIM is taken around its prediction without guidance.

    Defaults are the paper's for ImageNet; learning rate, warm-up and EMA are not stated there. Cost of an update: the
    student forward and backward, once more forward, and the teacher forward (twice when guided, not at all in "ct").

    Differs from the paper: the learning rate falls along the training loop's cosine. Not settled by the paper:
    ``huber_per``, see `pseudo_huber`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "imagenet-64": {"dropout": 0.2},
        "imagenet-128": {"dropout": 0.1},
        "text-to-image": {"updates": 30_000, "first_teacher_steps": 256, "last_teacher_steps": 256, "huber": 1.0},
        # Not from the paper: its shape at a hundredth of its length. Of the learning rates 2e-4 and 1e-3, tried for 300
        # updates with two steps, neither was clearly better.
        "sketch": {
            "updates": 2000, "batch": 32, "lr": 2e-4, "warmup": 100, "ema": 0.995, "anneal": 1000, "huber": 1.0,
            "pictures": 8000, "checkpoint_every": 250,
        },
    }  # fmt: skip

    mode: Literal["cd", "ct"] = "cd"
    """Distillation from the teacher, or training from the data alone (the teacher gives the first weights)."""
    first_teacher_steps: Annotated[float, at_least(1)] = 64
    """T at first: teacher steps over the whole of [0, 1]."""
    last_teacher_steps: Annotated[float, at_least(1)] = 1280
    """T at the end of its growth."""
    anneal: Natural = 100_000
    """Updates over which T (log-linearly) and eta (linearly) reach their last values."""
    eta: NotNegative = 0.75
    """Share of the squared error of the teacher's prediction that aDDIM puts back as variance; 0 is a DDIM teacher,
    which suits one and two steps better."""
    first_eta: NotNegative | None = None
    """Its value at first, when it too is to change; by default the same."""
    cfg_scale: float | None = None
    """Guidance of the teacher that goes into the student; 1 is none, by default the teacher's own."""
    huber: Positive = 1e-4
    """Epsilon of the pseudo-Huber distance: small is the norm, large the squared norm."""
    huber_per: Per = "picture"
    """Over the whole vector of a picture, or of each element and averaged."""
    dropout: Decay | None = None
    """Dropout in the student's network, with the same mask in both passes; by default as the network has it."""

    passes: ClassVar[float] = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.first_teacher_steps <= self.last_teacher_steps:
            raise BadInput(
                f"teacher steps grow from at least 1: not from {self.first_teacher_steps} to {self.last_teacher_steps}"
            )
        if self.mode == "ct" and self.cfg_scale not in (None, 1):
            raise BadInput("cfg_scale is the teacher's guidance, and mode=ct learns from the data alone: leave it out")

    def recipe(self, teacher: Model, student: Model, folder: Path, progress: bool = False) -> MultistepTraining:
        return MultistepTraining(self, teacher, student, self.open_data(teacher, folder, self.seed, progress))

    def substeps(self, step: int) -> int:
        """Teacher steps in a segment at update ``step``: N_teacher / S, rounded."""
        progress = ramp(step, self.anneal)
        total = teacher_steps(progress, self.first_teacher_steps, self.last_teacher_steps)
        return max(1, round(total / self.sampling_steps))

    def eta_at(self, step: int) -> float:
        """``eta`` at update ``step``."""
        first = self.eta if self.first_eta is None else self.first_eta
        return first + ramp(step, self.anneal) * (self.eta - first)


class MultistepTraining(Recipe):
    """`MultistepCM` as the loop sees it.

    ``teacher`` and ``student`` need a ``denoiser`` and ``unconditional(n)``, the student a ``network``, the teacher
    ``defaults["cfg_scale"]``.
    """

    name = "multistep-cm"

    def __init__(self, method: MultistepCM, teacher: Any, student: Any, data: CleanData):
        self.method, self.teacher, self.student, self.data = method, teacher, student, data
        self.scale = guidance(teacher, method.cfg_scale)
        student.network.train()
        layers = [layer for layer in student.network.modules() if isinstance(layer, nn.Dropout)]
        if method.dropout and not layers:
            raise BadInput(f"dropout={method.dropout:g}, but this network has no layers for it: leave it out")
        for layer in layers:
            layer.p = layer.p if method.dropout is None else method.dropout

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student.network}

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        return {"step": step, **self.data.batch(rng, size)}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        method, process = self.method, self.student.denoiser.process
        device = next(self.student.network.parameters()).device
        cond = self.data.conditioning(batch["rows"], batch["bare"])
        # Both DDIM maps divide by small numbers, so they run in float64 (which Apple's GPUs do not have).
        wide = torch.float32 if device.type == "mps" else torch.float64
        substeps = method.substeps(batch["step"])
        t, s, start = (x.to(device, wide) for x in draw_times(len(batch["x"]), method.sampling_steps, substeps, rng))
        x = batch["x"].to(device, wide)
        z = process.diffuse(x, t, normal(x.shape, rng).to(x))
        mask = int(torch.randint(2**31, (), generator=rng))
        with torch.no_grad():
            guess, plain = (x, x) if method.mode == "ct" else self.guess(z, t, cond)
            error = (plain - x).square().flatten(1).mean(1)
            z_s = addim_step(process, z, guess, t, s, method.eta_at(batch["step"]) * error)
            with same_dropout(mask, device):
                x0_s = predict(self.student.denoiser, z_s, s, cond)
            target = consistency_target(process, z, z_s, x0_s, t, s, start)
        with same_dropout(mask, device):
            difference = target - predict(self.student.denoiser, z, t, cond)
        losses = v_weight(process, t).to(x) * pseudo_huber(difference, method.huber, method.huber_per)
        rms = difference.detach().square().mean().sqrt()
        teacher_steps = torch.tensor(float(substeps * method.sampling_steps))
        return losses.mean(), {"difference": rms, "teacher_steps": teacher_steps}

    @torch.no_grad()
    def grid(self, rng: torch.Generator, n: int = 16) -> Tensor:
        """Pictures of the student, for captions or classes of the data."""
        rows = torch.randint(len(self.data.pictures), (n,), generator=rng)
        cond = self.data.conditioning(rows, torch.zeros(n, dtype=torch.bool))
        z = torch.randn(n, *self.student.latent_shape(), generator=rng).to(self.student.device)
        return sampled(self.student, z, self.method.sampling_steps, cond)

    def guess(self, z: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        """The teacher's x0, with its guidance and without."""
        denoiser = self.teacher.denoiser
        given = guided(self.teacher, denoiser, cond, self.scale, len(z))
        if not isinstance(given, Guided):
            plain = predict(denoiser, z, t, cond)
            return plain, plain
        to_x0 = lambda pred: denoiser.process.convert(pred, z, t, denoiser.prediction, "x0")
        with_guidance, plain = given.beside(z, t, cond)
        return to_x0(with_guidance), to_x0(plain)
