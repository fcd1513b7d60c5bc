"""Where sequences of frames come from: the sketch world in motion, a fluid, folders of frames, through one door."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .arrays import SUFFIXES as SUFFIXES_OF_ARRAYS
from .arrays import ArrayFrames
from .base import to_square, to_tensor, told_apart
from .walk import SUFFIXES, hidden, in_place


class Frames(Protocol):
    """Clips of consecutive frames by index. The same index always gives the same clip."""

    channels: int
    """Of a frame."""
    bounded: bool
    """Values lie in [-1, 1], as those of pictures do."""

    def __len__(self) -> int: ...

    def clip(self, index: int) -> Float[Tensor, "frames channels size size"]:
        """The frames of clip ``index``, float32."""
        ...


def open_frames(
    source: str, size: int, frames: int, *, seed: int = 0, count: int = 10_000, progress: bool = False
) -> Frames:
    """Clips of ``frames`` consecutive frames from ``source``.

    Args:
        source: "sketch", objects that move and bounce; "kolmogorov", the vorticity of a chaotic fluid; a folder with
            a subfolder for each sequence, whose pictures in the order of their names are its frames; or an array
            [sequence, frame, channel, size, size] in a .npy or .safetensors file.
        size: side in pixels.
        frames: length of a clip.
        seed: of the sketch world and of the fluid.
        count: how many clips of the sketch world; of the fluid, at least so many.
        progress: show a bar where the frames have to be computed first.

    Raises:
        BadInput: nothing is found there, or no sequence is long enough.
    """
    if frames < 1 or size < 1:
        raise BadInput(f"clips have at least one frame of at least one pixel, not {frames} of {size}")
    if source == "sketch":
        return SketchFrames(size, frames, seed, count)
    if source == "kolmogorov":
        from .kolmogorov import LENGTH, KolmogorovFrames

        flows = -(-count // max(LENGTH - frames + 1, 1))
        return KolmogorovFrames(size, frames, seed, flows=flows, progress=progress)
    if source.endswith(SUFFIXES_OF_ARRAYS):
        return ArrayFrames(Path(source), size, frames)
    if Path(source).is_dir():
        return FolderFrames(Path(source), size, frames)
    raise BadInput(
        f"no frames at {source!r}: give 'sketch', 'kolmogorov', a folder with a subfolder per sequence, or a .npy or "
        ".safetensors file"
    )


class SketchFrames:
    """``count`` clips of the sketch world: one to three objects that keep their course and bounce off the border."""

    channels, bounded = 3, True

    def __init__(self, size: int, frames: int, seed: int, count: int):
        self.size, self.frames, self.seed, self.count = size, frames, seed, count

    def __len__(self) -> int:
        return self.count

    def clip(self, index: int) -> Tensor:
        from sfumato.data import sketch
        from sfumato.data.sketch.motion import sequence

        rng = np.random.default_rng((self.seed, index))
        scenes = sequence(rng, self.frames, int(rng.integers(1, 4)))
        return to_tensor([sketch.render(scene, self.size) for scene in scenes])


class FolderFrames:
    """Every run of ``frames`` consecutive pictures in a subfolder of ``folder``, in the order of names, 2 before 10."""

    channels, bounded = 3, True

    def __init__(self, folder: Path, size: int, frames: int):
        self.size = size
        self.clips: list[list[Path]] = []
        for sequence in in_place((p for p in folder.iterdir() if p.is_dir() and not hidden((p.name,))), folder):
            shown = (f for f in sequence.iterdir() if f.suffix.lower() in SUFFIXES and not hidden((f.name,)))
            files = in_place(shown, sequence)
            self.clips += [files[i : i + frames] for i in range(len(files) - frames + 1)]
        if not self.clips:
            raise BadInput(f"no subfolder of {folder} holds {frames} pictures: one is needed for each sequence")

    def __len__(self) -> int:
        return len(self.clips)

    def identity(self) -> str:
        """By the frames' names; no picture is looked at."""
        return told_apart(len(self), [[f"{file.parent.name}/{file.name}" for file in clip] for clip in self.clips])

    def clip(self, index: int) -> Tensor:
        return to_tensor([to_square(file, self.size) for file in self.clips[index]])


def stack(frames: Frames, rows: list[int]) -> Float[Tensor, "row frames channels size size"]:
    """The clips ``rows``."""
    return torch.stack([frames.clip(row) for row in rows])
