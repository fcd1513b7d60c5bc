"""InstaFlow (arXiv:2309.06380): a flow is made straight by its own pairs, then distilled to a single step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, Share
from sfumato.files import write_json
from sfumato.pipeline import as_flow
from sfumato.plan import Plan
from sfumato.sample import dpmpp_2m
from sfumato.sample.times import uniform
from sfumato.train.loop import Run

from .base import Distiller, Model, guidance, guided, pure
from .parts.data import CleanData, FromPictures
from .parts.flow import Reduction, euler, straightness, velocity
from .parts.pairs import Ends, PairStore
from .parts.reflow import OneStep, Perceptual, Reflow, check_distance, distance

REPORTED = 64
"""Pairs over which straightness is averaged."""


@dataclass(frozen=True, kw_only=True)
class InstaFlow(FromPictures, Distiller):
    """One step, by straight paths: pairs from the teacher's ODE, reflow, new pairs, distillation.

    1. The teacher draws pairs (caption, noise X0, latent X1), by DPM-Solver++(2M), with its guidance: no pictures are
    used, only what ``data`` says of them. 2. Reflow: the network, from the teacher's weights, learns the velocity
    X1 - X0 at X_t = t X1 + (1 - t) X0 (mean squared error): the same ends, straighter paths. 3. The straightened flow,
    lightly guided, draws new pairs by Euler's rule. 4. Distillation: X0 + v(X0, 0) against X1', squared error first,
    then a perceptual distance of the decoded pictures. ``reflows`` repeats 2 and 3; with 0 the teacher's own pairs are
    distilled, which is the paper's baseline.

    All is kept in ``out`` and goes on after a kill: ``pairs-1``, ``reflow-1``, ... ``flow-1`` is the straightened model
    itself, for a few steps with guidance between 1 and 2; ``straightness.json`` tells how straight each flow is. The
    student draws in one Euler step; a U-Net is told 1000 at the noise, exactly.

    Defaults are the paper's for Stable Diffusion; in all, that is 199 days of one A100. Cost: ``pairs`` times
    ``teacher_steps`` calls of the teacher (twice that when guided) and of the flow; updates of plain training.

    Differs from the paper: the network's output is the flow eps - x0, the negative of the paper's velocity, as in this
    package and in diffusers: from a teacher of eps it starts nearer. All stages have one batch size; the paper's first
    70,000 updates of reflow have 64. Not confirmed by the paper (training code is not public): the learning rate of
    distillation, the rates' course, AdamW's other settings, that t is uniform on all of [0, 1]. The stacked U-Net of
    1.7 billion weights is not here.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **Distiller.EXAMPLE, "sampling_steps": 1, "pairs": 3, "shard": 2, "teacher_steps": 2, "flow_steps": 1,
        "reflow_updates": 1, "reflow_lr": 1e-3, "perceptual": "oracle", "perceptual_updates": 1,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "stable-diffusion-1-5": {"cfg_scale": 5.0},
        "pilot": {"cfg_scale": 6.0},
        "3-rectified-flow": {"cfg_scale": 6.0, "reflows": 2},
        # Not from the paper, and not tuned: its shape at a hundredth of its length, at the rates of a small network.
        "sketch": {
            "pairs": 8000, "pictures": 8000, "reflow_updates": 1000, "reflow_lr": 2e-4, "updates": 1500, "lr": 2e-4,
            "perceptual": "oracle", "perceptual_updates": 500, "batch": 32, "warmup": 100, "ema": 0.995,
            "checkpoint_every": 250,
        },
    }  # fmt: skip

    sampling_steps: Count = 1
    """The student's steps: one."""
    reflows: Natural = 1
    """How often the flow is straightened: 1 makes a 2-rectified flow, 0 distils the teacher as it is."""
    pairs: Count = 1_600_000
    """Pairs that each stage draws."""
    shard: Count = 256
    """Pairs in a file."""
    store: str | None = None
    """A folder for the teacher's pairs, to be shared by runs; by default ``pairs-1`` in the run's own."""
    teacher_steps: Count = 25
    """Steps of the teacher's solver."""
    cfg_scale: float | None = None
    """Guidance of the teacher's pairs; 1 is none, by default the teacher's own."""
    flow_steps: Count = 25
    """Euler steps of a straightened flow's pairs."""
    flow_cfg_scale: float = 1.5
    """Guidance of a straightened flow's pairs; none for a model that is told nothing."""
    reflow_updates: Count = 95_000
    reflow_lr: Positive = 1e-6
    """Highest learning rate of the first reflow."""
    again_lr: Positive = 1e-7
    """That of further ones."""
    reduction: Reduction = "mean"
    """Squared error as a mean over a latent's elements, or half their sum."""
    first_time: Share = 0.0
    """Reflow's t is uniform between this and 1; earlier code of the authors has 0.001."""
    perceptual: Perceptual = "lpips"
    """The distance of decoded pictures: LPIPS (AlexNet), or features of the sketch world's oracle."""
    perceptual_updates: Natural = 18_000
    """Updates, the last of all, in which that is the loss; before, it is the squared error of latents."""
    updates: Count = 39_500
    """Updates of the distillation."""
    batch: Count = 1024
    lr: Positive = 1e-6
    warmup: Natural = 1000
    decay: Literal["cosine", "linear", "constant"] = "constant"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NotNegative = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling_steps != 1:
            raise BadInput(f"sampling_steps must be 1, got {self.sampling_steps}: a flow is distilled to a single step")
        if self.perceptual_updates > self.updates:
            raise BadInput(f"perceptual_updates ({self.perceptual_updates}) are some of the updates ({self.updates})")

    def plan(self) -> Plan:
        plan = super().plan()
        call = plan.seconds / (self.passes * self.batch * self.updates)
        calls = self.pairs * 2 * (self.teacher_steps + self.reflows * self.flow_steps)
        more = calls + self.reflows * self.reflow_updates * self.batch * 3
        return replace(plan, seconds=plan.seconds + more * call)

    def asked(self, model: Model) -> CleanData:
        """What the data say, for ``model`` to be told; the pictures are not looked at."""
        return CleanData(model, self.found_for(model, self.seed), None, self.unconditional)

    def pairs_of(self, number: int, folder: Path, teacher: Model, data: CleanData) -> tuple[PairStore, Ends]:
        """The store of the teacher's pairs (number 1) or of a straightened flow's, and what draws them."""
        first, steps = number == 1, self.teacher_steps if number == 1 else self.flow_steps
        can = teacher.unconditional(1) is not None
        scale = guidance(teacher, self.cfg_scale) if first else self.flow_cfg_scale if can else 1.0
        where = Path(self.store) if first and self.store else folder / f"pairs-{number}"
        of = {"teacher": teacher.describe()["sha256"], "cfg_scale": scale, "steps": steps, "data": self.data,
              "caption": self.caption, "prompts": data.pictures.identity(), "seed": self.seed}  # fmt: skip

        def ends(noise: Tensor, rows: Tensor) -> Tensor:
            noise, cond = noise.to(teacher.device), data.conditioning(rows, torch.zeros(len(rows), dtype=torch.bool))
            given = guided(teacher, teacher.denoiser, cond, scale, len(rows))
            if not first:
                return euler(velocity(given, cond), noise, steps)
            return dpmpp_2m(given, pure(teacher.process, noise), uniform(steps), cond)

        return PairStore(where, self.pairs, of, self.shard), ends

    def prepare(self, teacher: Model, student: Model, folder: Path, progress: bool = False) -> None:
        if self.perceptual_updates:
            check_distance(self.perceptual)
        data, report, given = self.asked(teacher), {}, teacher
        as_flow(student)
        for number in range(1, self.reflows + 2):
            store, ends = self.pairs_of(number, folder, given, data)
            store.fill(ends, teacher.latent_shape(), len(data.pictures), min(self.batch, 64), progress)
            if number > self.reflows:
                return
            lr = self.reflow_lr if number == 1 else self.again_lr
            schedule = replace(self.schedule(), updates=self.reflow_updates, lr=lr)
            of = {"pairs": store.of, "reduction": self.reduction, "first_time": self.first_time}
            run = Run(Reflow(self, student, data, store), schedule, folder / f"reflow-{number}", of)
            run.fit(progress)
            student.defaults |= {"sampling_steps": self.flow_steps, "cfg_scale": self.flow_cfg_scale}
            report[f"reflow-{number}"] = self.report(student, data, store)
            run.finish(partial(self.keep, student, folder, number, report))
            given = student

    def keep(self, flow: Model, folder: Path, number: int, report: dict[str, Any]) -> None:
        """Write a straightened flow, unless it is there already, and how straight it is."""
        if not (folder / f"flow-{number}").exists():
            flow.save(folder / f"flow-{number}", provenance={"recipe": "distill instaflow, reflow", "number": number})
        write_json(folder / "straightness.json", report, overwrite=True)

    def recipe(self, teacher: Model, student: Model, folder: Path, progress: bool = False) -> OneStep:
        # The student is still the flow that drew the pairs.
        number, data = self.reflows + 1, self.asked(student)
        store, _ = self.pairs_of(number, folder, student if self.reflows else teacher, data)
        judge = distance(self.perceptual) if self.perceptual_updates else None
        return OneStep(self, student, data, store, judge)

    @torch.no_grad()
    def report(self, student: Model, data: CleanData, store: PairStore) -> dict[str, float]:
        """How straight a flow is, of its latents' dimensions together, and what its pairs cost to carry over."""
        rows = torch.arange(min(REPORTED, store.count))
        noise, clean = (x.to(student.device) for x in store.pairs(rows))
        cond = data.conditioning(rows % len(data.pictures), torch.zeros(len(rows), dtype=torch.bool))
        v = velocity(student.denoiser, cond)
        cost = lambda ends: float((ends - noise).square().flatten(1).sum(1).mean())
        return {
            "straightness": float(straightness(v, noise, self.flow_steps).mean()),
            "transport_before": cost(clean), "transport": cost(euler(v, noise, self.flow_steps)),
        }  # fmt: skip
