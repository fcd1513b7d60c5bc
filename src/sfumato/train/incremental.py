"""The run of `train cpdm`: task after task, replay, classifier, prototypes, diffusion, projection, accuracy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.data.base import Pictures
from sfumato.files import atomic_file, contact_sheet, save_png, write_json
from sfumato.foreign import read_tensors
from sfumato.pipeline import PrototypeModel
from sfumato.pipeline.prototypes import save_prototypes
from sfumato.progress import alone

from . import continual, draw
from .continual import Chosen, Drawn, Joined
from .course import Course, Plateau, correct, labels_of, logits_of
from .loop import Run
from .pixels import PixelTraining
from .projection import Projector, inputs_of
from .prototypes import first_prototypes, nearest_old, neighbour_error, surest, updated_prototypes
from .recipe import Gradients, Turn
from .schedule import NEUTRAL, Schedule
from .state import configuration, goes_on, rows_of

PROTOTYPES = "network.prototypes"
TEXTUAL, VISUAL = ("text_proj", "k", "v"), ("q", "out")
COLUMNS = 4096
"""Feature vectors of a layer from which its directions are found, at most."""


class PrototypeTraining(PixelTraining):
    """The diffusion model of one task, as the loop sees it.

    Args:
        recipe: a `CPDM`.
        pictures: new ones, and drawn ones of old classes.
        new, old: class numbers.
        projector: which has begun.
    """

    def __init__(
        self, recipe: Any, model: PrototypeModel, pictures: Joined, new: list[int], old: list[int],
        projector: Projector,
    ):  # fmt: skip
        super().__init__(recipe, model, pictures)
        self.cpdm, self.classes, self.new, self.old, self.projector = recipe, model, new, old, projector
        self.net: Any = model.network
        self.start = self.net.prototypes.detach().clone()
        self.nearest = torch.arange(len(model.labels))
        if old:
            self.nearest[new] = nearest_old(self.net.words.cpu(), new, old, recipe.neighbour)
        self.counts = torch.zeros(len(model.labels), dtype=torch.long)
        self.slope: Tensor | None = None

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        """Pictures, class numbers, whose text is dropped; and how many of each class all shares have."""
        whole = rng.whole() if isinstance(rng, draw.Share) else None
        rows = draw.integers(len(self.pictures), size, rng).tolist()
        everyone = rows if whole is None else draw.integers(len(self.pictures), whole.total, whole).tolist()
        x = self.recipe.read(self.pictures, rows)
        if self.recipe.flip:
            x = torch.where((draw.uniform(size, rng) < 0.5)[:, None, None, None], x.flip(-1), x)
        label = self.pictures.label
        counts = torch.bincount(torch.tensor([label(row) for row in everyone]), minlength=len(self.counts))
        dropped = draw.uniform(size, rng) < self.recipe.label_dropout
        return {"x": x, "labels": torch.tensor([label(row) for row in rows]), "dropped": dropped, "counts": counts}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device, denoise = self.model.device, self.model.denoiser
        x, labels, self.counts = batch["x"].to(device), batch["labels"], batch["counts"].cpu()
        t = self.recipe.times(len(x), rng).to(device)
        eps = draw.normal(x.shape, rng).to(device)
        cond = self.classes.classes(labels.to(device))
        z = self.model.process.diffuse(x, t, eps)
        pred = denoise(z, t, cond.drop(batch["dropped"], self.classes.unconditional(len(x))))
        error = (pred - eps).square().mean()
        rows = torch.isin(labels.cpu(), torch.tensor(self.new)).nonzero()[:, 0]
        if not (self.old and self.cpdm.tau and len(rows)):
            return error, {}
        place = rows.to(device)
        mine = cond[rows]
        with torch.no_grad():
            words = self.net.words[self.nearest[labels.cpu()[rows]].to(device)]
            theirs = denoise(z[place], t[place], mine.replace(words=words))
        steps = (t[place] * self.model.process.schedule.train_steps).round().long() - 1  # type: ignore[attr-defined]
        apart = neighbour_error(denoise(z[place], t[place], mine), theirs, steps)
        # The mean is over the new classes' pictures of all shares, and the loop weighs a share by its rows.
        share = self.counts.sum() / (self.counts[self.new].sum() * len(x))
        held = apart.sum() * share.item()
        return error + self.cpdm.tau * held, {"noise": error.detach(), "neighbour": held.detach()}

    def gradients(self, turn: Turn, gradients: Gradients) -> Gradients:
        """The prototypes' gradient is kept from the optimiser, for a rule of their own."""
        self.slope = gradients.pop(PROTOTYPES, None)
        return gradients

    def after_update(self, turn: Turn, step: int) -> None:
        self.projector.project()
        # A gradient of float16 that overflowed is passed over, as the optimiser does.
        if self.slope is not None and self.slope.isfinite().all():
            r, table, new = self.cpdm, self.net.prototypes, self.new
            towards = self.start.to(table.device)[new] if r.prototype_towards == "start" else None
            counts = self.counts[new].to(table.device)
            table[new] = updated_prototypes(
                table[new], self.slope[new], counts, r.prototype_lr, r.prototype_decay, towards
            )

    @torch.no_grad()
    def grid(self, rng: torch.Generator, n: int = 16) -> Float[Tensor, "n 3 height width"]:
        """Pictures of the classes so far, in turn."""
        known = [*self.old, *self.new]
        seeds = torch.randint(2**31, (n,), generator=rng).tolist()
        steps = min(50, self.model.sampling_steps)
        return self.model.draw([known[i % len(known)] for i in range(n)], seeds, sampling_steps=steps)


class TaskRun:
    """One run of a `CPDM` over all tasks, which goes on from what is finished of it."""

    def __init__(self, recipe: Any, out: Path, progress: bool):
        self.recipe, self.out, self.progress, self.training = recipe, out, progress, out / "training"
        pictures = recipe.open()
        self.rows = rows_of(recipe.data, pictures)
        goes_on(self._folder(0, "diffusion"), configuration(recipe.name(), recipe, self._own(0)))
        self.judge = recipe.judge()
        seen, unseen, self.told = self.judge.parts(recipe.labels_of(pictures))
        names = tuple(seen.label_names)
        self.labels = recipe.labels_of(seen)
        self.tasks = [[self.labels.index(name) for name in task] for task in recipe.sequence(names)]
        numbers = {names.index(name): i for i, name in enumerate(self.labels)}
        self.real, self.test = (self._by_class(part, numbers) for part in (seen, unseen))
        torch.manual_seed(recipe.seed)
        self.model = recipe.model(self.labels)
        self.net: nn.Module = self.judge.network(self.labels).train()
        network: Any = self.model.network
        self.projector = Projector(network.layers(*recipe.protect))
        self.lr = recipe.classifier_lr[0]

    def run(self, overwrite: bool) -> None:
        """All tasks, and what is written of them."""
        old: list[int] = []
        rows, notes, last = [], [], None
        for i, new in enumerate(self.tasks):
            torch.manual_seed(draw.step_seed(self.recipe.seed, i, 11))
            now = sorted([*old, *new])
            real = self._of(self.real, new)
            places = continual.held_back(real.labels, self.recipe.validation, i)
            train, choose = (real.part(part) for part in places)
            parts = continual.replay_parts(drawn) if (drawn := self._replay(i, old)) else None
            plateau = self._classify(i, train, choose, parts, now)
            right = [correct(self.net, self._of(self.test, task), now).double().mean() for task in self.tasks[: i + 1]]
            rows.append([x.item() for x in right])
            chosen, real_only = plateau.best.item(), plateau.real.item()
            notes.append({"validation": chosen, "validation_real": real_only, "lr": self.lr, "classes": len(now)})
            self._remember(i, train, new, now)
            last = self._diffuse(i, Joined(train, *([parts[0]] if parts else [])), new, old)
            self._protect(i, train, new)
            if alone():
                self._write_classifier(i, right)
            old = now
        assert last is not None  # there are two tasks at least
        last.finish(lambda: self._write(rows, notes, overwrite))

    # The parts of a task

    def _replay(self, i: int, old: list[int]) -> Drawn | None:
        """What the model of the task before draws of every old class; drawn once."""
        n, file = self.recipe.replay, self._folder(i, "replay.safetensors")
        if not old or not n:
            return None
        if file.exists():
            found, _ = read_tensors(file, "drawn pictures")
            return Drawn(found["pictures"].numpy(), found["labels"].tolist())
        self.model.network.eval()
        seed = draw.step_seed(self.recipe.seed, i, 12) % 2**31
        x = self.model.sample(old, n, seed, batch=128, progress=self.progress)
        pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        labels = torch.tensor(old).repeat_interleave(n)
        if alone():
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as temporary:
                save_file({"pictures": pixels, "labels": labels}, temporary)
            columns = min(n, 10)
            shown = np.concatenate([row[:columns] for row in pixels.numpy().reshape(-1, n, *pixels.shape[1:])])
            sheet = contact_sheet(shown, columns, side=32)
            (self.out / "replay").mkdir(exist_ok=True)
            save_png(self.out / "replay" / f"before-task-{i + 1}.png", sheet, overwrite=True)
        return Drawn(pixels.numpy(), labels.tolist())

    def _classify(
        self, i: int, real: Chosen, choose: Chosen, replay: tuple[Drawn, Drawn] | None, now: list[int]
    ) -> Plateau:
        """Train the classifier; in the first task with every rate, of which the best is kept."""
        r = self.recipe
        rates = r.classifier_lr if i == 0 else (self.lr,)
        start = {name: x.clone() for name, x in self.net.state_dict().items()}
        drawn, by = replay or (None, None)
        found: list[tuple[Plateau, dict[str, Tensor], float]] = []
        for lr in rates:
            self.net.load_state_dict(start)
            self.net.requires_grad_(True).train()
            course = Course(
                self.net, real, drawn, [choose if len(choose) else real, *([by] if by else [])], now,
                r.classifier_batch, lr, r.momentum, r.classifier_weight_decay, Plateau(r.patience, r.stop), r.epoch,
                self.judge.augmented,
            )  # fmt: skip
            schedule = Schedule(
                updates=r.classifier_epochs * course.epoch, batch=r.classifier_batch, lr=lr, warmup=0, decay="constant",
                clip_norm=0.0, ema=0.0, seed=self._seed(i, 13), checkpoint_every=r.checkpoint_every, track="none",
                precision=r.precision, workers=r.workers,
            )  # fmt: skip
            diffusion = {n: x for n, x in dataclasses.asdict(r.schedule()).items() if n not in NEUTRAL}
            own = {**self._own(i), **{f"diffusion {name}": x for name, x in diffusion.items()}}
            folder = self._folder(i, "classifier" if len(rates) == 1 else f"classifier-{lr:g}")
            Run(course, schedule, folder, own).fit(self.progress)
            weights = {name: x.clone() for name, x in course.best.state_dict().items()}
            found.append((course.plateau, weights, lr))
        plateau, weights, self.lr = max(found, key=lambda one: one[0].best.item())
        self.net.load_state_dict(weights)
        self.net.requires_grad_(False).eval()
        return plateau

    def _remember(self, i: int, real: Chosen, new: list[int], now: list[int]) -> None:
        """The first prototypes of the new classes."""
        if self.recipe.prototype == "none":
            return
        rng = torch.Generator().manual_seed(self._seed(i, 14))
        sure = lambda least: surest(logits_of(self.net, real), labels_of(real), new, now, least)
        table: Any = self.model.network.prototypes
        chosen = first_prototypes(self.recipe.prototype, real, new, sure, rng)
        with torch.no_grad():
            table[new] = chosen.to(table)

    def _diffuse(self, i: int, pictures: Joined, new: list[int], old: list[int]) -> Run:
        network = self.model.network.train()
        network.requires_grad_(True)
        network.prototypes.requires_grad_(self.recipe.learns_prototypes)
        self.projector.begin()
        training = PrototypeTraining(self.recipe, self.model, pictures, new, old, self.projector)
        schedule = dataclasses.replace(self.recipe.schedule(), seed=self._seed(i, 0))
        run = Run(training, schedule, self._folder(i, "diffusion"), self._own(i))
        run.fit(self.progress)
        network.requires_grad_(False).eval()
        return run

    @torch.no_grad()
    def _protect(self, i: int, real: Chosen, new: list[int]) -> None:
        """Add what the protected layers see of the new classes to what is kept."""
        r, model, network = self.recipe, self.model, self.model.network
        text, seen = (
            network.layers(*(kind for kind in r.protect if kind in kinds))
            for kinds in (TEXTUAL, VISUAL)
        )
        if text:
            cond = model.classes(torch.tensor(new, device=model.device))
            nothing = cond[0].replace(words=torch.zeros_like(cond.words[:1]))
            told = type(cond).cat([cond, nothing])
            with inputs_of(text) as heard:
                model.denoiser(torch.zeros(len(told), *model.shape, device=model.device), 0.5, told)
            self.projector.grow({name: torch.cat(rows) for name, rows in heard.items()})
        if seen:
            rng = torch.Generator().manual_seed(self._seed(i, 15))
            with inputs_of(seen) as heard:
                for _ in range(-(-r.protect_pictures // r.batch)):
                    rows = draw.integers(len(real), r.batch, rng).tolist()
                    x = r.read(real, rows).to(model.device)
                    t, eps = r.times(len(x), rng).to(model.device), draw.normal(x.shape, rng).to(model.device)
                    cond = model.classes(labels_of(real)[rows].to(model.device))
                    cond = cond.drop(draw.uniform(len(x), rng) < r.label_dropout, model.unconditional(len(x)))
                    model.denoiser(model.process.diffuse(x, t, eps), t, cond)
            joined = {name: torch.cat(rows) for name, rows in heard.items()}
            some = {name: torch.randperm(len(x), generator=rng)[:COLUMNS] for name, x in joined.items()}
            picked = {name: x[some[name].to(x.device)] for name, x in joined.items()}
            self.projector.grow(picked, min(1.0, r.threshold + r.threshold_rise * i))

    # What is written

    def _write_classifier(self, i: int, right: list[Tensor]) -> None:
        card = {"measured_on": self.told, "task": i + 1, "accuracy_by_task": [x.item() for x in right]}
        (self.out / "classifiers").mkdir(exist_ok=True)
        self.judge.save(self.out / "classifiers" / str(i + 1), self.net, self.labels, card, overwrite=True)

    def _write(self, rows: list[list[float]], notes: list[dict[str, Any]], overwrite: bool) -> None:
        n = len(rows)
        matrix = torch.tensor([row + [0.0] * (n - len(row)) for row in rows], dtype=torch.float64)
        sizes = [len(task) for task in self.tasks]
        found = {
            "tasks": [[self.labels[k] for k in task] for task in self.tasks], "measured_on": self.told, "matrix": rows,
            "average_accuracy": continual.average_accuracy(matrix).tolist(),
            "weighted_accuracy": continual.weighted_accuracy(matrix, sizes).tolist(),
            "forgetting": continual.forgetting(matrix).tolist(), "classifiers": notes,
        }  # fmt: skip
        write_json(self.out / "accuracy.json", found, overwrite=True)
        if self.recipe.prototype != "none":
            save_prototypes(self.out / "prototypes.safetensors", self.model.prototypes(), overwrite=True)
        self.model.save(self.out / "model", overwrite=overwrite, provenance=self.recipe.made())

    # Small things

    def _folder(self, i: int, name: str) -> Path:
        return self.training / f"task-{i + 1}" / name

    def _own(self, i: int) -> dict[str, Any]:
        return {**self.recipe.beyond(), **self.rows, "task": i + 1}

    def _seed(self, i: int, stream: int) -> int:
        """The first task's diffusion has the recipe's own seed."""
        return draw.step_seed(self.recipe.seed, i, stream) if i or stream else self.recipe.seed

    @staticmethod
    def _by_class(pictures: Pictures, numbers: dict[int, int]) -> Chosen:
        labels = [pictures.label(row) for row in range(len(pictures))]
        rows = [row for row, label in enumerate(labels) if label in numbers]
        return Chosen(pictures, rows, [numbers[labels[row]] for row in rows])

    @staticmethod
    def _of(pictures: Chosen, classes: list[int]) -> Chosen:
        return pictures.part([place for place, label in enumerate(pictures.labels) if label in classes])
