"""What a distillation recipe is: a `Recipe` of the training loop with a frozen teacher, and a student to be saved.

A method is a dataclass that inherits `Distiller` and says in `recipe` what is its own: which networks it trains and
what their losses are. Teacher and student are both either a `Text2Image` or an `ImageModel`, so a method asks both for
`denoiser`, `network`, `unconditional` and `defaults` and need not know which it has. One that needs clean data inherits
`sfumato.distill.data.FromPictures` as well; one that needs another network makes it with ``teacher.copy(own="full")``.
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
from sfumato.noise import GaussianProcess
from sfumato.noise.process import Prediction
from sfumato.pipeline import ImageModel, Text2Image, VideoModel, few_steps, load, read_record
from sfumato.plan import Plan
from sfumato.sample import ddim
from sfumato.sample.times import uniform
from sfumato.settings import Tuned
from sfumato.train.loop import Run
from sfumato.train.recipe import Recipe
from sfumato.train.schedule import Schedule

Model = Text2Image | ImageModel


@dataclass(frozen=True, kw_only=True)
class Distiller(Tuned, Schedule, ABC):
    """Fields and run of every distillation; not a method itself."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "sampling_steps": 2, "updates": 3, "batch": 2, "warmup": 1, "lr": 1e-3, "checkpoint_every": 2,
        "grid_every": 2, "accumulate": 2,
    }  # fmt: skip
    """Settings that take a second with a tiny teacher, for the tests that all distillations share."""

    teacher: str | Text2Image | ImageModel = "sketch"
    """An embedded model, a folder of a pipeline or of a training run, or a hub id."""
    sampling_steps: int = 4
    """Steps in which the student will sample."""
    updates: int = 200_000
    batch: int = 2048
    """Pictures in an update."""
    lr: float = 1e-4
    warmup: int = 1000
    weight_decay: float = 0.0
    ema: float = 0.9999
    checkpoint_every: int = 500

    passes: ClassVar[float] = 3.0
    """What an update costs, in forward passes of the network; a backward pass counts as two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.sampling_steps, self.updates) < 1:
            raise BadInput("sampling_steps and updates must be at least 1")

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
            BadInput: as `sfumato.load`; a teacher whose prediction or noise process is unknown.
        """
        model = _load(self.teacher) if isinstance(self.teacher, str) else self.teacher
        if not isinstance(model, Model):
            raise BadInput(f"a teacher is a model, not a {type(model).__name__}: wrap or load it with sfumato")
        if isinstance(model, VideoModel):
            raise BadInput("this teacher is a model of frames: only models of pictures can be distilled")
        denoiser = model.denoiser
        if denoiser.prediction not in get_args(Prediction) or not isinstance(denoiser.process, GaussianProcess):
            raise BadInput(
                f"this teacher predicts {denoiser.prediction!r} under {type(denoiser.process).__name__}; a teacher "
                f"must predict one of {', '.join(get_args(Prediction))} under a Gaussian process"
            )
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
        return Plan(f"distill {self.name()} to {self.sampling_steps} steps", memory=memory, seconds=seconds)

    def run(self, out: str | Path, progress: bool = True) -> Path:
        """Distill, or go on distilling, and write the student to ``out/model``; `sfumato.load` reads ``out`` too.

        Raises:
            BadInput: ``out`` is a file or holds a run with other settings; the teacher or the data cannot be used.
        """
        out = Path(out)
        if out.exists() and not out.is_dir():
            raise BadInput(f"{out} is a file where a folder is to be written: choose another name")
        try:
            teacher = self.open_teacher()
            process = PartialState(cpu=not torch.cuda.is_available())
            # Where the loop will train; a teacher given as an object may be elsewhere.
            device = process.device
            for part in teacher.parts().values():
                part.to(device)
            torch.manual_seed(self.seed)
            student = teacher.copy(own="full")
            parent = self.parent(teacher)
            own = {**self.beyond(), "teacher": parent["sha256"]}
            with process.main_process_first():  # the others find what it has prepared
                recipe = self.recipe(teacher, student, out, progress and process.is_main_process)
            Run(recipe, self, out / "training", own).fit(progress)
        finally:
            _load.cache_clear()
        student.network.requires_grad_(False).eval()
        self.finish(student)
        made = {"recipe": f"distill {self.name()}", "config": self.settings(), "parent": parent}
        if process.is_main_process:
            student.save(out / "model", overwrite=True, provenance=made)
        process.wait_for_everyone()
        return out / "model"


@lru_cache(maxsize=1)
def _load(name: str) -> Model:
    """`load`, once for the plan and the run that follows it."""
    return load(name)


def sampled(model: Model, z: Tensor, steps: int, cond: Any) -> Tensor:
    """What a student in training draws from the noise ``z``, as pictures in [0, 1]."""
    return (model.decode_latents(ddim(model.denoiser, z, uniform(steps), cond)) + 1).clamp(0, 2) / 2
