"""Sequences of frames in arrays: .npy and .safetensors files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.finite import NONE, NotFinite, finite
from sfumato.foreign import reading

SUFFIXES = (".npy", ".safetensors")
PIECE = 64
"""Frames that are looked at together."""


class ArrayFrames:
    """Every run of ``frames`` consecutive frames of an array [sequence, frame, channel, size, size], read as needed.

    One sequence may come as [frame, channel, size, size]. Whole numbers of 8 bits are pixels and become [-1, 1];
    floating point values are taken as they are, and are bounded if they say so by lying in [-1, 1], all of them.
    A .safetensors file holds one tensor, or names the one that is meant "frames".

    Raises:
        BadInput: no such array, another size, or sequences shorter than ``frames``.
    """

    def __init__(self, file: Path, size: int, frames: int):
        self.file, self.frames, self.array = file, frames, _open(file)
        shape = tuple(self.array.shape if isinstance(self.array, np.ndarray) else self.array.get_shape())
        self.single = len(shape) == 4
        shape = (1, *shape) if self.single else shape
        if len(shape) != 5:
            raise BadInput(f"{file} holds an array of shape {list(shape)}: frames come as [sequence, frame, channel, "
                           "height, width]")  # fmt: skip
        self.sequences, length, self.channels, height, width = shape
        if (height, width) != (size, size):
            raise BadInput(f"the frames of {file} have {height}x{width} pixels, not {size}x{size}")
        self.each = length - frames + 1
        if self.each < 1 or not self.sequences:
            raise BadInput(f"the sequences of {file} have {length} frames, fewer than the {frames} asked for")
        kind = self.array.dtype.newbyteorder("=") if isinstance(self.array, np.ndarray) else None
        if kind is not None and kind not in (np.uint8, np.float16, np.float32, np.float64):
            raise BadInput(f"{file} holds {kind.name}: frames are uint8 or floating point of at most 64 bits")
        first = self._part(0, 0, 1)
        if first.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise BadInput(f"{file} holds {first.dtype}: frames are uint8 or floating point")
        self.pixels = first.dtype == torch.uint8
        self.bounded = self.pixels or all(
            bool(self._part(i, start, start + PIECE).abs().max() <= 1)
            for i in range(self.sequences)
            for start in range(0, length, PIECE)
        )

    def __len__(self) -> int:
        return self.sequences * self.each

    def identity(self) -> str:
        """By their number and the file's size; no value is looked at."""
        return f"{self.sequences:,} sequences of {self.each + self.frames - 1:,} in {self.file.stat().st_size:,} bytes"

    def clip(self, index: int) -> Float[Tensor, "frames channels size size"]:
        sequence, start = divmod(range(len(self))[index], self.each)
        part = self._part(sequence, start, start + self.frames).float()
        if not finite(part):
            raise NotFinite(f"sequence {sequence} of {self.file} holds numbers that are {NONE}: write it without them")
        return part.div(127.5).sub(1) if self.pixels else part

    def _part(self, sequence: int, start: int, end: int) -> Tensor:
        part = self.array[start:end] if self.single else self.array[sequence, start:end]
        # A copy, in this machine's order of bytes, whichever the file has.
        return part if isinstance(part, Tensor) else torch.from_numpy(np.array(part, part.dtype.newbyteorder("=")))


def _open(file: Path):
    """The array on disk: a memory map, or a slice of safetensors."""
    with reading(file, "an array"):
        if file.suffix == ".npy":
            return np.load(file, mmap_mode="r", allow_pickle=False)
        opened = safe_open(file, "pt")
        names = list(opened.keys())
        name = "frames" if "frames" in names else names[0] if len(names) == 1 else None
        if name is None:
            raise BadInput(f"{file} holds the tensors {', '.join(names)}, and none of them is called frames")
        return opened.get_slice(name)
