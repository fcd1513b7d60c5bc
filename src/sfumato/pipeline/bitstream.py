"""Compressed pictures as bytes: the range coder, and a header by which what is foreign or cut off is told apart.

A stream is: "sfc1", four bytes of the model's hash, height, width and length of the payload (7 bits a byte, the lowest
first), the CRC-32 of all before it and of the payload (little endian), and the payload: the words of the range coder.
"""

from __future__ import annotations

import importlib
import zlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.foreign import AGAIN, reading

MAGIC = b"sfc1"
OUTSIDE = 4096
"""What lies outside its table is coded as one of the 2 OUTSIDE + 1 numbers around 0, all alike likely."""


def _constriction() -> Any:
    try:
        return importlib.import_module("constriction")
    except ImportError as error:
        raise BadInput("to write or read bytes, install the range coder: pip install 'sfumato[compress]'") from error


class _Tables:
    """The entropy models of a codec's tables, each made once."""

    def __init__(self) -> None:
        self.models: dict[tuple[int, int], Any] = {}
        self.kinds = _constriction().stream.model
        self.outside = self.kinds.Uniform(2 * OUTSIDE + 1)

    def model(self, counts: Int[Tensor, "row width"], row: int) -> tuple[Any, int]:
        """The model of a row, and half of its width."""
        key = (counts.data_ptr(), row)
        if key not in self.models:
            used = counts[row][counts[row] > 0].double().cpu().numpy()
            # The library gives every symbol one part in 2^24 and shares out the others in proportion to these: as they
            # are as many as there are parts, no rounding is left to it, and a symbol has its count.
            self.models[key] = self.kinds.Categorical(used - 1, perfect=False), len(used) // 2 - 1
        return self.models[key]


class RangeWriter:
    """A `sfumato.nets.elic.Coder` that writes."""

    def __init__(self) -> None:
        self.tables, self.encoder = _Tables(), _constriction().stream.queue.RangeEncoder()

    def code(self, values: Int[Tensor, "n"], rows: Int[Tensor, "n"], counts: Tensor) -> Int[Tensor, "n"]:
        numbers, table = values.cpu().numpy(), rows.cpu().numpy()
        for row in np.unique(table):
            model, half = self.tables.model(counts, int(row))
            here = numbers[table == row]
            inside = np.abs(here) <= half
            self.encoder.encode(np.where(inside, here + half, 2 * half + 1).astype(np.int32), model)
            if not inside.all():
                self.encoder.encode((here[~inside] + OUTSIDE).astype(np.int32), self.tables.outside)
        return values

    def payload(self) -> bytes:
        """What has been written."""
        return self.encoder.get_compressed().astype("<u4").tobytes()


class RangeReader:
    """A `sfumato.nets.elic.Coder` that reads what `RangeWriter` wrote, in the same order."""

    def __init__(self, payload: bytes):
        words = np.frombuffer(payload, "<u4").astype(np.uint32)
        self.tables, self.decoder = _Tables(), _constriction().stream.queue.RangeDecoder(words)

    def code(self, values: None, rows: Int[Tensor, "n"], counts: Tensor) -> Int[Tensor, "n"]:
        table = rows.cpu().numpy()
        found = np.zeros(len(table), np.int64)
        for row in np.unique(table):
            model, half = self.tables.model(counts, int(row))
            here = self.decoder.decode(model, int((table == row).sum())).astype(np.int64) - half
            if (outside := here > half).any():
                here[outside] = self.decoder.decode(self.tables.outside, int(outside.sum())) - OUTSIDE
            found[table == row] = here
        return torch.from_numpy(found)


class Tally:
    """A `sfumato.nets.elic.Coder` that writes nothing and counts ``bits``: -log2 of what the tables say."""

    def __init__(self) -> None:
        self.bits = 0.0

    def code(self, values: Int[Tensor, "n"], rows: Int[Tensor, "n"], counts: Tensor) -> Int[Tensor, "n"]:
        numbers, rows = values.to(counts.device), rows.to(counts.device)
        halves, totals = (counts > 0).sum(1)[rows] // 2 - 1, counts.sum(1)[rows]
        outside = numbers.abs() > halves
        column = torch.where(outside, 2 * halves + 1, numbers + halves)
        share = counts[rows, column].double() / totals
        self.bits += float(-share.log2().sum()) + int(outside.sum()) * float(np.log2(2 * OUTSIDE + 1))
        return values


def pack(payload: bytes, height: int, width: int, of: bytes) -> bytes:
    """A stream of a picture of that size by the model with the hash ``of``, four bytes."""
    head = MAGIC + of + b"".join(map(_number, (height, width, len(payload))))
    return head + zlib.crc32(head + payload).to_bytes(4, "little") + payload


def unpack(data: bytes, of: bytes, name: str = "the stream") -> tuple[int, int, bytes]:
    """Height, width and payload of what `pack` made.

    Args:
        of: the four bytes of the model's hash that are expected.
        name: what the refusal calls the stream.

    Raises:
        BadInput: it is something else, of another model, cut off, too long or damaged.
    """
    if not data.startswith(MAGIC):
        raise BadInput(f"{name} is no picture that sfumato compress wrote: give one that is")
    theirs = data[len(MAGIC) : len(MAGIC) + 4]
    if len(theirs) == 4 and theirs != of:
        raise BadInput(
            f"{name} was written with another model ({theirs.hex()}) than this one ({of.hex()}): give that one"
        )
    at = len(MAGIC) + 4
    numbers = []
    for _ in range(3):
        number, at = _read_number(data, at, name)
        numbers.append(number)
    height, width, length = numbers
    there = len(data) - at - 4
    if there < length:
        raise BadInput(f"{name} is cut off, {max(0, there)} of {length} bytes of the picture are there: {AGAIN}")
    if there > length:
        raise BadInput(f"{name} has {there - length} bytes behind its end: {AGAIN}")
    head, check, payload = data[:at], data[at : at + 4], data[at + 4 :]
    if zlib.crc32(head + payload) != int.from_bytes(check, "little") or not height or not width or length % 4:
        raise BadInput(f"{name} is damaged, its checksum is another: {AGAIN}")
    return height, width, payload


def read_with(reader_of: Any, payload: bytes, name: str) -> Any:
    """``reader_of(RangeReader(payload))``, where whatever goes wrong in a forged payload is a `BadInput`."""
    reader = RangeReader(payload)
    with reading(name, "a compressed picture"):
        return reader_of(reader)


def _number(n: int) -> bytes:
    out = bytearray()
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def _read_number(data: bytes, at: int, name: str) -> tuple[int, int]:
    number = shift = 0
    while True:
        if at >= len(data):
            raise BadInput(f"{name} is cut off in its first bytes: {AGAIN}")
        if shift > 28:
            raise BadInput(f"{name} is damaged in its first bytes: {AGAIN}")
        byte, at = data[at], at + 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, at
