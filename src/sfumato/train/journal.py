"""What a run tells while it lasts: a bar, ``log.jsonl``, pictures, and a tracker."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import unknown
from sfumato.files import atomic_file, contact_sheet, save_png
from sfumato.plan import human_time
from sfumato.progress import console, say
from sfumato.text import counted, visible

BETWEEN = 60.0
"""Seconds between two lines of a run that no terminal shows."""


class Journal:
    """Context manager; an inactive one (of a process that is not the main one) does nothing.

    Args:
        folder: of the run; None: there is nothing but the bar.
        config: of the run, for the tracker.
        track: as `Schedule.track`.
        step: where the run goes on; what the log says of later steps is forgotten, they will come again.
        active: whether this process tells anything.
        progress: show a bar.
        title: what the bar says; by default the recipe's name.

    Raises:
        BadInput: the tracker is unknown or not installed.
    """

    def __init__(
        self, folder: Path | None, config: dict[str, Any], track: str, step: int, active: bool, progress: bool,
        title: str = "",
    ):  # fmt: skip
        self.active, self.text, self.step, self.bar = active, "", step, None
        self.folder = folder if active else None
        self.tracker = _tracker(track, self.folder, config) if self.folder else None
        self.title, self.total = visible(title or config["recipe"]), config["updates"]
        self.telling = active and progress and not console().is_terminal
        """Whether lines are told instead of a bar."""
        self.told = time.monotonic()
        if active and progress and not self.telling:
            from rich.markup import escape
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            texts = (TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, *texts, console=console())
            self.task = self.bar.add_task(escape(self.title), total=self.total, completed=step, text="")

    def __enter__(self) -> Journal:
        if self.folder and (file := self.folder / "log.jsonl").exists():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step(line) <= self.step]
            if len(kept) < len(lines):
                with atomic_file(file, overwrite=True) as new:
                    new.write_text("".join(line + "\n" for line in kept))
        if self.bar:
            self.bar.start()
        self._say()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        self._say()
        if self.tracker:
            self.tracker.finish()

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step, to the log, the tracker and the bar."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.tracker:
            self.tracker.log(figures, step=step)
        rate, left = figures["pictures_per_second"], human_time(figures["seconds_left"])
        losses = [f"{name.replace('/', ' ')} {value:.4f}" for name, value in figures.items() if name.endswith("loss")]
        self.text = f"{'  '.join(losses)}  {rate:.3g} pictures/s  {left} left"

    def pictures(self, step: int, pictures: Float[Tensor, "n 3 height width"]) -> None:
        """A sheet of pictures in [0, 1], to ``grids/STEP.png`` and the tracker."""
        if not self.folder:
            return
        arrays = (pictures.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        sheet = contact_sheet(arrays, columns=max(1, round(len(arrays) ** 0.5)))
        save_png(self.folder / "grids" / f"{step:07d}.png", sheet, {"step": step}, overwrite=True)
        if self.tracker and hasattr(self.tracker, "log_images"):
            batch = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
            self.tracker.log_images({"samples": sheet[None] if batch else [sheet]}, step=step, **batch)

    def advance(self, step: int) -> None:
        """Move the bar."""
        self.step = step
        if self.bar:
            self.bar.update(self.task, completed=step, text=self.text)
        if time.monotonic() - self.told > BETWEEN:
            self._say()

    def _say(self) -> None:
        """A line on where it is, where no terminal shows the bar."""
        if self.telling:
            self.told = time.monotonic()
            say(f"{self.title}: {self.step} of {counted(self.total, 'update')}  {self.text}".rstrip())


def _tracker(track: str, folder: Path, config: dict[str, Any]) -> Any:
    """One of accelerate's trackers, started, or None."""
    installed = [str(name) for name in get_available_trackers()]
    if track == "auto":
        track = "tensorboard" if "tensorboard" in installed else "none"
    if track == "none":
        return None
    if track not in installed:
        raise unknown("or uninstalled tracker", track, ["none", *installed])
    logging.getLogger("accelerate.tracking").setLevel(logging.ERROR)
    make = LOGGER_TYPE_TO_CLASS[track]
    tracker = make(track, folder) if make.requires_logging_directory else make(f"sfumato {config['recipe']}")
    with suppress(AttributeError):  # older versions start on construction
        tracker.start()
    if track != "tensorboard":  # it would write a file of its own for each setting of a resumed run
        tracker.store_init_configuration(config)
    return tracker


def _step(line: str) -> int:
    """The step of a line of the log; one that a kill cut short, or somebody edited, counts as later than all."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return 2**63
    return step if isinstance(step, int) else 2**63
