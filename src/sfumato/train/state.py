"""What a checkpoint holds, and how it is written and read; also for networks that are sharded over processes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sfumato.errors import BadInput

FORMAT = 2
"""Changes when a checkpoint's tensors or what is drawn in a step change."""

Modules = Mapping[str, nn.Module]
Tensors = dict[str, Tensor]


def parameters(modules: Modules) -> dict[str, nn.Parameter]:
    """The trained parameters, named MODULE.PARAMETER."""
    return {f"{k}.{n}": p for k, m in modules.items() for n, p in m.named_parameters() if p.requires_grad}


def rest(modules: Modules) -> Tensors:
    """All else that belongs to the networks: frozen parameters and persistent buffers."""
    named = {f"{k}.{n}": t for k, m in modules.items() for n, t in m.state_dict(keep_vars=True).items()}
    trained = {id(p) for p in parameters(modules).values()}
    first = {id(t): n for n, t in reversed(named.items())}  # tied tensors have several names: the first is kept
    return {n: t for n, t in named.items() if id(t) not in trained and first[id(t)] == n}


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


def _local(tensors: Collection[Tensor]) -> list[Tensor]:
    return [t.detach().to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


def lerp(average: Tensors, params: Mapping[str, Tensor], weight: float) -> None:
    """Move every average by ``weight`` towards its parameter, in place."""
    torch._foreach_lerp_(_local(average.values()), _local(params.values()), weight)


@contextmanager
def swapped(params: Mapping[str, Tensor], average: Tensors) -> Iterator[None]:
    """The averaged weights in the networks while the block lasts."""
    mine, other = _local(params.values()), _local(average.values())
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


def collect(modules: Modules, params: Mapping[str, Tensor], average: Tensors, optimizer: Any) -> dict[str, Tensors]:
    """The tensors of a checkpoint by file; every process of a sharded run must take part."""
    names, moments = list(params), optimizer.state_dict()["state"]
    files = {
        "weights": {**params, **rest(modules)},
        "average": average,
        "optimizer": {f"{names[i]}/{k}": torch.as_tensor(v) for i, s in moments.items() for k, v in s.items()},
    }
    return {file: {n: whole(t.detach()).contiguous() for n, t in tensors.items()} for file, tensors in files.items()}


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
        about = json.loads((folder / "run.json").read_text())
        saved, version = about["config"], about.get("format", 1)
    except (ValueError, LookupError) as error:
        raise _damaged(folder, error) from error
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
def load(folder: Path, modules: Modules, params: Mapping[str, Tensor], average: Tensors, optimizer: Any) -> None:
    """Read what `write` wrote into networks, averages and optimiser.

    Raises:
        BadInput: the checkpoint is damaged.
    """
    try:
        files = ("weights", "average", "optimizer")
        weights, averages, moments = (load_file(folder / f"{name}.safetensors") for name in files)
        for name, tensor in {**params, **rest(modules)}.items():
            put(tensor, weights[name])
        for name, tensor in average.items():
            put(tensor, averages[name])
        place = {n: i for i, n in enumerate(params)}
        state: dict[int, Any] = {}
        for key, value in moments.items():
            name, field = key.rsplit("/", 1)
            sharded = value.shape == params[name].shape and value.ndim
            state.setdefault(place[name], {})[field] = like(params[name], value) if sharded else value
    except (SafetensorError, OSError, LookupError, RuntimeError) as error:
        raise _damaged(folder, error) from error
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def finish(modules: Modules, params: Mapping[str, Tensor], average: Tensors, plain: Modules) -> None:
    """Put the averaged weights into the networks, and if they are sharded, what they were before in their place."""
    if not plain:
        for name, p in params.items():
            p.copy_(average[name])
        return
    final = {n: whole(t.detach()) for n, t in {**rest(modules), **average}.items()}
    for name, module in modules.items():
        module.__class__ = plain[name].__class__
        module.__dict__ = plain[name].to(next(iter(final.values())).device).__dict__
    for name, tensor in {**parameters(modules), **rest(modules)}.items():
        tensor.copy_(final[name])


def _damaged(folder: Path, error: Exception) -> BadInput:
    return BadInput(f"the checkpoint in {folder} is damaged ({error}): remove {folder.parent} to start anew")
