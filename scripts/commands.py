"""What scripts share that show the very commands they run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path


def output(command: str) -> str:
    """What a command writes."""
    words = shlex.split(command)
    return words[words.index("--out") + 1]


def run(command: str, folder: Path, quiet: bool = False) -> None:
    """Run a command of sfumato in a folder, with this interpreter."""
    print(command, flush=True)
    # A shell would replace the patterns of files.
    words = [str(next(folder.glob(w)).relative_to(folder)) if "*" in w else w for w in shlex.split(command)]
    subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL if quiet else None
    )
