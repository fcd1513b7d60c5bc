"""What a checkpoint holds, and how it is written and read; also for networks that are sharded over processes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sfumato.data.pictures import DRAWN
from sfumato.errors import BadInput
from sfumato.foreign import read_json, reason

from .schedule import NEUTRAL, Schedule

FORMAT = 2
"""Changes when a checkpoint's tensors or what is drawn in a step change."""

Modules = Mapping[str, nn.Module]
Tensors = dict[str, Tensor]


def parameters(modules: Modules) -> dict[str, nn.Parameter]:
    """The trained parameters, named MODULE.PARAMETER."""
    return {f"{k}.{n}": p for k, m in modules.items() for n, p in m.named_parameters() if p.requires_grad}


def rest(modules: Modules, copies: Modules) -> Tensors:
    """What else changes: the persistent buffers of the networks, and all of their ``copies``.

    Frozen parameters do not: who goes on with a run brings them along again.
    """
    named = {f"{k}.{n}": t for k, m in modules.items() for n, t in m.state_dict(keep_vars=True).items()}
    named = {n: t for n, t in named.items() if not isinstance(t, nn.Parameter)}
    named |= {f"{k}.{n}": t for k, m in copies.items() for n, t in m.state_dict(keep_vars=True).items()}
    first = {id(t): n for n, t in reversed(named.items())}  # tied tensors have several names: the first is kept
    return {n: t for n, t in named.items() if first[id(t)] == n}


def masters(params: Mapping[str, nn.Parameter]) -> Tensors:
    """What an optimiser updates: the parameters themselves, or where those are of half precision, float32 copies.

    An update of 1e-5 is lost in a bfloat16 weight of 0.05, and in a float16 one AdamW divides by zero.
    """
    half = (torch.float16, torch.bfloat16)
    return {n: p.detach().float().requires_grad_() if p.dtype in half else p for n, p in params.items()}


def hand_down(params: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> None:
    """Copy the masters into the parameters that have one."""
    halves = [name for name, p in params.items() if masters[name] is not p]
    if halves:
        torch._foreach_copy_(_local([params[n] for n in halves]), _local([masters[n] for n in halves]))


def hand_up(params: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> None:
    """What was changed in parameters that have a master is changed there too; all else keeps its precision."""
    for name, p in params.items():
        if masters[name] is not p:
            (own,), (above,) = _local([p]), _local([masters[name]])
            above.copy_(torch.where(above.to(own.dtype) == own, above, own.to(above.dtype)))


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded.

    Raises:
        RuntimeError: another shape.
    """
    target.copy_(like(target, value))


def like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor laid out over processes and devices as ``target`` is."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def local(tensors: Mapping[str, Tensor]) -> Tensors:
    """What this process has of each."""
    return dict(zip(tensors, _local(tensors.values()), strict=True))


def _local(tensors: Collection[Tensor]) -> list[Tensor]:
    return [t.detach().to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


def lerp(average: Tensors, params: Mapping[str, Tensor], weight: float) -> None:
    """Move every average by ``weight`` towards its parameter, in place."""
    torch._foreach_lerp_(_local(average.values()), _local(params.values()), weight)


@contextmanager
def swapped(params: Mapping[str, Tensor], average: Tensors) -> Iterator[None]:
    """The averaged weights, as far as there are some, in the networks while the block lasts."""
    if not average:  # torch copies no empty list
        yield
        return
    mine, other = _local([params[name] for name in average]), _local(average.values())
    kept = [t.clone() for t in mine]
    torch._foreach_copy_(mine, other)
    try:
        yield
    finally:
        torch._foreach_copy_(mine, kept)


@contextmanager
def evaluation(modules: Modules) -> Iterator[None]:
    """The networks in evaluation mode while the block lasts."""
    modes = [(part, part.training) for module in modules.values() for part in module.modules()]
    for module in modules.values():
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back."""
    return json.loads(json.dumps(config))


@dataclass
class Updated:
    """What one turn's optimiser updates."""

    prefix: str
    """Of its moments in a checkpoint; empty where the run has one turn."""
    weights: Tensors
    """The masters, by the names of their parameters, in the optimiser's order."""
    optimizer: torch.optim.Optimizer

    def moments(self) -> Tensors:
        """The optimiser's state by PARAMETER/FIELD."""
        names, state = list(self.weights), self.optimizer.state_dict()["state"]
        kept = {f"{names[i]}/{k}": v for i, fields in state.items() for k, v in fields.items() if v is not None}
        return {self.prefix + name: torch.as_tensor(value) for name, value in kept.items()}

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Put what `moments` gave back into the optimiser.

        Raises:
            LookupError: moments of a parameter that it does not update.
        """
        place = {n: i for i, n in enumerate(self.weights)}
        state: dict[int, dict[str, Any]] = {}
        for key, value in moments.items():
            if not key.startswith(self.prefix):
                continue
            name, field = key.removeprefix(self.prefix).rsplit("/", 1)
            sharded = value.shape == self.weights[name].shape and value.ndim
            value = like(self.weights[name], value) if sharded else value
            if not value.ndim and not value.is_floating_point():
                value = int(value)  # bitsandbytes counts steps so
            state.setdefault(place[name], {})[field] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def collect(weights: Tensors, average: Tensors, updated: Iterable[Updated]) -> dict[str, Tensors]:
    """The tensors of a checkpoint by file; every process of a sharded run must take part."""
    moments = {name: value for one in updated for name, value in one.moments().items()}
    files = {"weights": weights, "average": average, "optimizer": moments}
    return {file: {n: whole(t.detach()).contiguous() for n, t in tensors.items()} for file, tensors in files.items()}


def configuration(name: str, schedule: Schedule, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """What shapes a run, in plain values: the recipe's name, the schedule, and what is the recipe's own."""
    told = asdict(schedule.schedule())
    if told["optimizer"] == "adam":  # as runs say nothing of it that began when there was no other
        del told["optimizer"]
    return plain({"recipe": name, **told, **(own or {})})


def rows_of(source: str, data: Any) -> dict[str, str]:
    """What tells a run's data from others in its configuration: a vocabulary or classes of files that have changed
    would be another's. Of worlds that are drawn, the settings say all."""
    return {"rows": data.identity()} if source not in DRAWN and hasattr(data, "identity") else {}


def goes_on(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint in ``folder`` tells, if there is one, so that a run with ``config`` can go on from it.

    Raises:
        BadInput: it is one of another configuration or version, or damaged.
    """
    if not (folder / "checkpoint" / "run.json").exists():
        return None
    # A constant rate does not know when it ends.
    free = NEUTRAL | ({"updates"} if config["decay"] == "constant" else set())
    return read(folder / "checkpoint", config, free)


def machine(device: torch.device) -> dict[str, Any]:
    """What decides, besides the settings, in which order sums are rounded."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return {"device": kind, "threads": threads, "torch": torch.__version__.partition("+")[0]}


def tell_changes(folder: Path, before: Any, now: dict[str, Any]) -> None:
    """Warn where a run goes on in a way that rounds otherwise than the one that wrote its checkpoint."""
    before = before if isinstance(before, dict) else now
    if changed := [f"{name}: {before.get(name)}, now {x}" for name, x in now.items() if before.get(name) != x]:
        told = f"the run in {folder} goes on otherwise than it began ({'; '.join(changed)})"
        warnings.warn(f"{told}: sums are rounded in another order, so the bits are not those of one run", stacklevel=3)


def write(folder: Path, files: dict[str, Tensors], about: dict[str, Any]) -> None:
    """Write ``FILE.safetensors`` of each and ``run.json``."""
    for file, tensors in files.items():
        save_file(tensors, folder / f"{file}.safetensors")
    (folder / "run.json").write_text(json.dumps(about, indent=1))


def read(folder: Path, config: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
    """``run.json`` of a checkpoint, if the run may go on with ``config``.

    Raises:
        BadInput: it is of another version, or a setting that is not among ``free`` differs.
    """
    try:
        about = read_json(folder / "run.json", {"config": dict}, "it is not whole")
    except BadInput as error:
        raise _damaged(folder, error) from error
    saved, version = about["config"], about.get("format", 1)
    for key in sorted(config.keys() | saved.keys()):
        ours, theirs = config.get(key), saved.get(key)
        if ours != theirs and key not in free:
            raise BadInput(
                f"{folder.parent} holds a run with {key}={theirs!r}, and this one has {key}={ours!r}: "
                "use the same setting to go on, or another folder to start anew"
            )
    if version != FORMAT:
        raise BadInput(
            f"the checkpoint in {folder} is of format {version}, written by another version that draws other noise; "
            f"this one reads format {FORMAT}: go on with the version that wrote it, or use another folder to start anew"
        )
    return about


@torch.no_grad()
def load(
    folder: Path, weights: Tensors, average: Tensors, updated: Iterable[Updated]
) -> dict[str, list[float]]:
    """Read what `write` wrote into weights, averages and optimisers; the losses so far.

    Raises:
        BadInput: the checkpoint is damaged.
    """
    try:
        files = ("weights", "average", "optimizer", "history")
        kept, averages, moments, history = (load_file(folder / f"{name}.safetensors") for name in files)
        for name, tensor in weights.items():
            put(tensor, kept[name])
        for name, tensor in average.items():
            put(tensor, averages[name])
        for one in updated:
            one.restore(moments)
        return {name: losses.tolist() for name, losses in history.items()}
    except Exception as error:  # safetensors', torch's and our own, each with classes of its own
        raise _damaged(folder, error) from error


@torch.no_grad()
def finish(modules: Modules, copies: Modules, final: Tensors, plain: Modules) -> None:
    """Put the ``final`` weights into the networks, and if they are sharded, what they were before in their place."""
    if not plain:
        for name, p in parameters(modules).items():
            p.copy_(final[name])
        return
    final = {n: whole(t.detach()) for n, t in {**rest(modules, copies), **final}.items()}
    for name, module in modules.items():
        module.__class__ = plain[name].__class__
        module.__dict__ = plain[name].to(next(iter(final.values())).device).__dict__
    for name, tensor in {**parameters(modules), **rest(modules, copies)}.items():
        tensor.copy_(final[name])


def _damaged(folder: Path, error: Exception) -> BadInput:
    why = str(error) if isinstance(error, BadInput) else reason(error)
    return BadInput(f"the checkpoint in {folder} is damaged ({why}): remove {folder.parent} to start anew")
