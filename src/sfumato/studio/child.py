"""The process in which a job works: a command, with what it says going into files of the job's folder."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import parent_process
from pathlib import Path

from sfumato import cli, progress
from sfumato.errors import SfumatoError
from sfumato.text import visible

OUT, ERR, MOVED = "out.txt", "err.txt", "progress.json"
LOOK = "look"
"""The one thing that is no command: to load a model and say what it is."""
BETWEEN = 0.1
"""Seconds between two notes of progress."""
WARM = (
    "sfumato.studio.child", "sfumato.pipeline", "sfumato.commands.verb", "sfumato.commands.sample",
    "transformers.models.clip.modeling_clip", "diffusers.models.unets.unet_2d_condition",
)  # fmt: skip
"""What the process that all jobs are forked from has imported already."""


def work(args: Sequence[str], folder: Path) -> None:
    """Run one command and end the process with its status.

    It ends too when the studio does, however that went.
    """
    os.setsid()
    for number, name in ((1, OUT), (2, ERR)):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    progress.listener = Notes(folder / MOVED)
    sys.argv = ["sfumato", *args]
    sys.exit(look(args[1]) if args[0] == LOOK else cli.main(args))


def look(model: str) -> int:
    """Load a model, and print what there is to say of it as JSON."""
    from sfumato.pipeline import load

    try:
        made = load(model)
    except SfumatoError as error:
        print(f"sfumato: {visible(str(error))}", file=sys.stderr)
        return 2
    except Exception as error:
        told = visible(f"{type(error).__name__}: {error}")
        print(f"sfumato: {visible(model)} cannot be read: {told}", file=sys.stderr)
        return 2
    told = {
        "family": type(getattr(made, "pipe", made)).__name__,
        "size": made.size,
        "parameters": sum(p.numel() for p in made.network.parameters()),
        "words": {name: list(words) for name, words in getattr(made, "vocabulary", {}).items()},
        "sampling_steps": made.sampling_steps,
        "sha256": made.describe().get("sha256"),
        "text": hasattr(made, "encode"),
    }
    print(json.dumps(told, default=str))
    return 0


class Notes:
    """The newest progress in a file, which is whole whenever it is read."""

    def __init__(self, path: Path):
        self.path, self.told = path, 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        if 0 < done < total and time.monotonic() - self.told < BETWEEN:
            return
        self.told = time.monotonic()
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps([label, done, total]), encoding="utf-8")
        os.replace(new, self.path)


def _end_with(parent: object) -> None:
    if parent is not None:
        parent.join()  # type: ignore[attr-defined]
        os._exit(1)
