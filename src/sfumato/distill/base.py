"""What a distillation recipe is: a `Recipe` of the training loop with a frozen teacher, and a student to be saved.

A method is a dataclass that inherits `Distiller` and says in `recipe` what is its own: which networks it trains and
what their losses are. Teacher and student are a `Model` each, of whatever kind. One that needs clean data inherits
`sfumato.distill.parts.data.FromPictures` as well; one that needs another network makes it with
``teacher.copy(own="full")``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from accelerate import PartialState
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive
from sfumato.noise import Denoiser, GaussianProcess
from sfumato.noise.process import Prediction
from sfumato.pipeline import Model, few_steps, load, read_record
from sfumato.pipeline.distilled import check_few_steps
from sfumato.plan import Plan
from sfumato.sample import Guided, ddim
from sfumato.sample.times import uniform
from sfumato.settings import Tuned
from sfumato.text import counted
from sfumato.train.loop import Run
from sfumato.train.outputs import is_there, ours
from sfumato.train.recipe import Recipe
from sfumato.train.schedule import Schedule
from sfumato.train.state import configuration, goes_on


@dataclass(frozen=True, kw_only=True)
class Distiller(Tuned, Schedule, ABC):
    """Fields and run of every distillation; not a method itself."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "sampling_steps": 2, "updates": 3, "batch": 2, "warmup": 1, "lr": 1e-3, "checkpoint_every": 2,
        "grid_every": 2, "accumulate": 2,
    }  # fmt: skip
    """Settings that take a second with a tiny teacher, for the tests that all distillations share."""

    teacher: str | Model = "sketch"
    """An embedded model, a folder of a pipeline or of a training run, or a hub id."""
    sampling_steps: Count = 4
    """Steps in which the student will sample."""
    updates: Count = 200_000
    batch: Count = 2048
    """Pictures in an update."""
    lr: Positive = 1e-4
    warmup: Natural = 1000
    weight_decay: NotNegative = 0.0
    ema: Decay = 0.9999
    checkpoint_every: Count = 500

    passes: ClassVar[float] = 3.0
    """What an update costs, in forward passes of the network; a backward pass counts as two."""

    # What a method says

    @abstractmethod
    def recipe(self, teacher: Model, student: Model, folder: Path, progress: bool = False) -> Recipe:
        """What the loop trains.

        Args:
            teacher: frozen; it shares its weights with what the user gave, so they must not be changed.
            student: a copy whose ``network`` is the caller's to train.
            folder: where the run lives, for what should outlast a kill (encoded pictures, drawn pairs).
            progress: show bars while preparing.
        """

    def rows(self, model: Model) -> dict[str, str]:
        """What tells the data that it learns from, beside the settings; nothing where there are none."""
        return {}

    def prepare(self, teacher: Model, student: Model, folder: Path, progress: bool = False) -> None:
        """What comes before `recipe`, on all processes together: stages of training, pairs that the teacher draws.

        The student may be changed. A run that goes on calls it again, so what it made is kept in ``folder``.
        """

    def finish(self, student: Model) -> None:
        """Tell the trained student how it draws: by default in ``sampling_steps`` steps without noise or guidance."""
        few_steps(student, self.sampling_steps)

    # The run

    @classmethod
    def name(cls) -> str:
        """The catalogue's name: the module's."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    def open_teacher(self) -> Model:
        """The teacher, frozen, over the weights of what the user gave.

        Raises:
            BadInput: as `sfumato.load`; a teacher whose prediction or noise process is unknown, or whose student could
                not be told how it draws.
        """
        model = _load(self.teacher) if isinstance(self.teacher, str) else self.teacher
        if not isinstance(model, Model):
            raise BadInput(f"a teacher is a model, not a {type(model).__name__}: wrap or load it with sfumato")
        if len(model.latent_shape()) != 3:
            raise BadInput("this teacher is a model of frames: only models of pictures can be distilled")
        denoiser = model.denoiser
        if denoiser.prediction not in get_args(Prediction) or not isinstance(denoiser.process, GaussianProcess):
            raise BadInput(
                f"this teacher predicts {denoiser.prediction!r} under {type(denoiser.process).__name__}; a teacher "
                f"must predict one of {', '.join(get_args(Prediction))} under a Gaussian process"
            )
        check_few_steps(model)
        return model.frozen_copy()

    def settings(self) -> dict[str, Any]:
        """The configuration in plain values; a teacher given as an object is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values if isinstance(self.teacher, str) else {k: v for k, v in values.items() if k != "teacher"}

    def parent(self, teacher: Model) -> dict[str, Any]:
        """Where the teacher comes from: its own record, as far as it has one, and the hash of its weights."""
        record = read_record(self.teacher).get("provenance") if isinstance(self.teacher, str) else None
        return {**(record or {}), "sha256": teacher.describe()["sha256"]}

    def plan(self) -> Plan:
        """Memory, and time from one forward pass of the teacher."""
        teacher = self.open_teacher()
        weights = sum(p.numel() for p in teacher.network.parameters())
        n = min(self.batch, 16)
        z = torch.zeros(n, *teacher.latent_shape(), device=teacher.device)
        cond = teacher.unconditional(n)
        with torch.no_grad():
            teacher.denoiser(z, 0.5, cond)  # the first call pays for what later ones find ready
            began = time.perf_counter()
            teacher.denoiser(z, 0.5, cond)
        seconds = self.passes * (time.perf_counter() - began) * self.batch / n * self.updates
        memory = {"teacher": weights * teacher.network.dtype.itemsize, "student, averaged too": 8 * weights}
        memory |= {"gradients": 4 * weights, "optimiser": 8 * weights}
        return Plan(f"distill {self.name()} to {counted(self.sampling_steps, 'step')}", memory=memory, seconds=seconds)

    def made(self, parent: dict[str, Any]) -> dict[str, Any]:
        """How the student is made, for its record."""
        return {"recipe": f"distill {self.name()}", "config": self.settings(), "parent": parent}

    def finished(self, out: str | Path, overwrite: bool = False) -> bool:
        """Whether ``out/model`` is the student of this run already, so that `run` has nothing left to do.

        Raises:
            BadInput: something else is there; the teacher cannot be used.
        """
        if overwrite or not (Path(out) / "model").exists():
            return False
        return is_there(Path(out) / "model", self.made(self.parent(self.open_teacher())))

    def run(self, out: str | Path, progress: bool = True, overwrite: bool = False) -> Path:
        """Distill, or go on distilling, and write the student to ``out/model``; `sfumato.load` reads ``out`` too.

        A run that is `finished` is left as it is.

        Raises:
            BadInput: ``out`` is a file or holds a run with other settings, or another process is at work in it;
                something else is in the student's place (without ``overwrite``); the teacher or the data cannot be
                used.
        """
        try:
            with ours(Path(out)) as folder:
                if not self.finished(folder, overwrite):
                    self._run(folder, progress, overwrite)
        finally:
            _load.cache_clear()
        return Path(out) / "model"

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        teacher = self.open_teacher()
        process = PartialState(cpu=not torch.cuda.is_available())
        # Where the loop will train; a teacher given as an object may be elsewhere.
        device = process.device
        for part in teacher.parts().values():
            part.to(device)
        torch.manual_seed(self.seed)
        student = teacher.copy(own="full")
        parent = self.parent(teacher)
        own = {**self.beyond(), "teacher": parent["sha256"], **self.rows(teacher)}
        goes_on(out / "training", configuration(self.name(), self, own))
        self.prepare(teacher, student, out, progress and process.is_main_process)
        with process.main_process_first():  # the others find what it has prepared
            recipe = self.recipe(teacher, student, out, progress and process.is_main_process)
        run = Run(recipe, self, out / "training", own)
        run.fit(progress)
        student.network.requires_grad_(False).eval()
        self.finish(student)
        run.finish(lambda: student.save(out / "model", overwrite=overwrite, provenance=self.made(parent)))


def guidance(teacher: Any, asked: float | None) -> float:
    """The teacher's guidance that goes into the student: what is asked for, by default the teacher's own.

    Raises:
        BadInput: it is asked for of a teacher that cannot be guided.
    """
    if asked is None:
        return teacher.defaults["cfg_scale"]
    if asked != 1 and teacher.unconditional(1) is None:
        raise BadInput(f"cfg_scale={asked:g}, but this teacher is told nothing, so it has no guidance: leave it out")
    return asked


def guided(teacher: Any, denoiser: Denoiser, cond: Any, scale: float, n: int) -> Denoiser:
    """``denoiser`` with guidance as the teacher draws with it: in its interval of log-SNRs, and rescaled as it does."""
    without = None if scale == 1 else teacher.unconditional(n)
    if without is None:
        return denoiser
    interval, rescale = teacher.defaults.get("cfg_interval"), getattr(teacher, "rescaled", None)
    return Guided(denoiser, cond, without, scale, interval, "logsnr", rescale)


@lru_cache(maxsize=1)
def _load(name: str) -> Model:
    """`load`, once for the plan and the run that follows it."""
    return load(name)


def pure(process: GaussianProcess, eps: Tensor) -> Tensor:
    """What sampling begins with: noise of deviation 1, ``eps``, in the process's own scale."""
    return process.diffuse(torch.zeros_like(eps), 1.0, eps)


def sampled(model: Model, z: Tensor, steps: int, cond: Any) -> Tensor:
    """What a student in training draws from the noise ``z``, of deviation 1, as pictures in [0, 1]."""
    z = pure(model.denoiser.process, z)
    return (model.decode_latents(ddim(model.denoiser, z, uniform(steps), cond)) + 1).clamp(0, 2) / 2
