"""One process of a run: how it joins the others, what they hold together, and what its networks draw from."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import nn

from sfumato.errors import BadInput


class Trained(nn.Module):
    """All networks of a run as one, so that one wrapper for parallel training sees whatever the recipe does with them.

    A recipe holds the networks themselves and may call any method of theirs; what runs in ``forward`` of the wrapper
    is synchronised.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        # Where sharding may cut, as the networks' libraries say.
        names = (getattr(m, "_no_split_modules", None) or () for m in modules.values())
        self._no_split_modules = sorted(set().union(*names))

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def own_device() -> torch.device | None:
    """Where this process works among several; None if it is alone, and may work anywhere."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    return PartialState(cpu=not torch.cuda.is_available()).device


def seed_globally(seed: int) -> None:
    """What networks draw from without being given a generator; quicker than torch's own ``manual_seed``."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def joined(precision: str, some_unused: bool) -> Accelerator:
    """This process's part in the run.

    Raises:
        BadInput: it was launched in a way that is not supported.
    """
    AcceleratorState._reset_state()  # one run in this process may be of another precision than the next
    ddp = DistributedDataParallelKwargs(find_unused_parameters=some_unused)
    # Only sharding needs to know the precision; elsewhere the loop casts by itself, on whatever device it trains.
    precision = precision if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise BadInput(f"training under {kind.value} is not supported: launch plain processes, or FSDP version 2")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise BadInput("FSDP version 1 is not supported: add --fsdp_version 2 to accelerate launch")
    return accelerator
