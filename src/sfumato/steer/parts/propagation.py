"""Encoder propagation: reusing a UNet's encoder from step to step, and decoding steps ahead in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.pipeline.anatomy import Call
from sfumato.pipeline.split import ENCODER_ONLY, Features, decode, encode
from sfumato.pipeline.steering import Forward, Interceptor, Run


def tile(x: Float[Tensor, "rows ..."], n: int, halves: int) -> Float[Tensor, "rows*n ..."]:
    """Each row n times, step by step inside each guidance half: [half 1: step 1 all pictures, step 2 ...; half 2 ...].

    So the halves of the tiled batch are the tiled halves of the batch, and the picture of a row is its number modulo
    the number of pictures, as it was: what looks at either (attention edits, adapters) works as before.
    """
    parts = x.unflatten(0, (halves, -1))
    return parts.unsqueeze(1).expand(halves, n, *parts.shape[1:]).flatten(0, 2)


def untile(x: Float[Tensor, "rows*n ..."], n: int, halves: int) -> Float[Tensor, "n rows ..."]:
    """One batch per step again: the inverse of `tile` for what differs from step to step."""
    return x.unflatten(0, (halves, n, -1)).transpose(0, 1).flatten(1, 2)


def tile_inputs(value: Any, rows: int, n: int, halves: int) -> Any:
    """`tile` of every tensor with that many rows in dictionaries, lists and tuples; all else as it is."""
    if torch.is_tensor(value):
        return tile(value, n, halves) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {k: tile_inputs(v, rows, n, halves) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(tile_inputs(v, rows, n, halves) for v in value)
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two network inputs are equal, tensors bit for bit."""
    if a is b:
        return True
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(x, b[k]) for k, x in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return not torch.is_tensor(a) and not torch.is_tensor(b) and a == b


@dataclass
class _Slot:
    """What the calls with one conditioning keep from step to step."""

    features: Features | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    ready: dict[int, Tensor] = field(default_factory=dict)
    steady: bool = True


@dataclass
class _Memory:
    """What one run keeps: its key steps, and a slot for each call that a step makes, in their order."""

    keys: list[int]
    step: int = -1
    calls: int = 0
    slots: list[_Slot] = field(default_factory=list)
    control: tuple[int, Any] = (0, None)
    """For how many rows a ControlNet ran last, and what it gave."""

    def next_call(self, step: int) -> int:
        """The number of the next call in this step, from 0."""
        return self.calls + 1 if step == self.step else 0

    def slot(self, step: int) -> _Slot:
        """The slot of the next call in this step."""
        self.calls, self.step = self.next_call(step), step
        if self.calls == len(self.slots):
            self.slots.append(_Slot())
        return self.slots[self.calls]


class Propagation(Interceptor):
    """Runs the encoder at key steps only, and injects noise; see `FasterDiffusion` for what this computes.

    Attributes:
        told: counts so far: the network's calls that belong to a run, and runs and rows of either half (a row is one
            latent of a batch); runs of a ControlNet, if there is one.

    Args:
        keys: gives the key steps of a run with so many steps.
        ahead: how many steps may be decoded in one batch; 0 is no limit.
        alpha, threshold: strength of the injected noise, and the share of the training timesteps below which it is.
        early: inject before the network's input is made, not only before the update.
    """

    def __init__(
        self, keys: Callable[[int], list[int]], ahead: int, alpha: float, threshold: float, early: bool = False
    ):
        self.keys, self.ahead, self.alpha, self.threshold, self.early = keys, ahead, alpha, threshold, early
        self.told = {"calls": 0, "encoder_runs": 0, "encoder_rows": 0, "decoder_runs": 0, "decoder_rows": 0}
        self._memory: WeakKeyDictionary[Run, _Memory] = WeakKeyDictionary()

    def start(self, run: Run) -> None:
        self._memory[run] = _Memory(self.keys(len(run.timesteps)))

    def before_network(self, run: Run, z: Tensor) -> Tensor:
        return self._injected(run, z) if self.early else z

    def before_update(self, run: Run, z: Tensor) -> Tensor:
        return self._injected(run, z)

    def control(self, forward: Callable[[], Any], z: Tensor, run: Run | None) -> Any:
        memory = None if run is None else self._memory.get(run)
        if memory is not None and memory.control[0] == len(z) and self.spares(run):
            return memory.control[1]  # nobody reads it where the encoder does not run
        self.told["control_runs"] = self.told.get("control_runs", 0) + 1
        out = forward()
        if memory is not None:
            memory.control = len(z), out
        return out

    def spares(self, run: Run | None) -> bool:
        """Whether the network's next call takes the encoder's features of an earlier step."""
        memory = None if run is None else self._memory.get(run)
        if memory is None or run.index in memory.keys:
            return False
        call = memory.next_call(run.index)
        return call < len(memory.slots) and memory.slots[call].features is not None

    def predict(self, forward: Forward, call: Call, run: Run | None) -> Tensor:
        memory = None if run is None else self._memory.get(run)
        if memory is None or not run.at(call.timestep):
            return forward(call)
        i, rows = run.index, len(call.z)
        slot = memory.slot(i)
        self.told["calls"] += 1
        inputs = {k: v for k, v in call.inputs.items() if k not in ENCODER_ONLY}
        if i in slot.ready:
            if same(inputs, slot.inputs):
                return slot.ready.pop(i)
            slot.steady = False  # the prompt changes from step to step: nothing can be decoded ahead
        slot.ready.clear()
        end = next((k for k in memory.keys if k > i), len(run.timesteps))
        if i in memory.keys or slot.features is None or len(slot.features) != rows:
            slot.steady, slot.features = True, None
            self._count("encoder", rows)
            if end == i + 1:
                self._count("decoder", rows)
                return forward(call)
            slot.features = encode(call.network, call.z, call.timestep, **call.inputs)
        end = end if call.until is None else min(end, call.until)
        n = min(end - i, self.ahead or end - i) if slot.steady else 1
        self._count("decoder", n * rows)
        if n == 1:
            return decode(call.network, slot.features, call.timestep, **inputs)
        first, *later = _decode_ahead(call, slot.features, run, inputs, n)
        slot.ready, slot.inputs = dict(enumerate(later, start=i + 1)), inputs
        return first

    def _injected(self, run: Run, z: Tensor) -> Tensor:
        if not self.alpha or run.timesteps[run.index] >= self.threshold * run.T:
            return z
        return z + self.alpha * run.noise(z)

    def _count(self, half: str, rows: int) -> None:
        self.told[f"{half}_runs"] += 1
        self.told[f"{half}_rows"] += rows


def _decode_ahead(
    call: Call, features: Features, run: Run, inputs: dict[str, Any], n: int
) -> Float[Tensor, "n rows channel height width"]:
    """The predictions of this step and the n - 1 that follow."""
    rows = len(call.z)
    halves = rows // run.pictures if rows % run.pictures == 0 else 1
    times = torch.tensor(run.timesteps[run.index : run.index + n], dtype=torch.float32, device=call.z.device)
    steps = times.repeat_interleave(rows // halves).repeat(halves)
    tiled = features.map(lambda x: tile(x, n, halves))
    with replace(call, rows=None if call.rows is None else tile(call.rows, n, halves)).told():
        out = decode(call.network, tiled, steps, **tile_inputs(inputs, rows, n, halves))
    return untile(out, n, halves)
